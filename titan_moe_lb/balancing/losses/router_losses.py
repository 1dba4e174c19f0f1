"""All losses of one router, applied together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import spmd_types as spmd
import torch
from torchtitan.protocols.module import ModuleDict

from titan_moe_lb.balancing.losses.base import AuxLoss, LogitsLoss, SumsLoss, check_kind
from titan_moe_lb.balancing.losses.counting import DISPATCHED, SELECTED, CountSource
from titan_moe_lb.balancing.losses.injection import attach_to_logits
from titan_moe_lb.balancing.recording.recomputation import is_recomputation
from titan_moe_lb.balancing.recording.step_record import RouterRecord
from titan_moe_lb.balancing.valid_tokens.batch_tokens import BatchTokens, Sequences
from titan_moe_lb.functional import at_least_float32, probability_sums
from titan_moe_lb.parallel.local_shard import local_shard, placed_as
from titan_moe_lb.parallel.rank_groups import RankGroups
from titan_moe_lb.upstream.torch_internals import all_reduce


class RouterLosses(ModuleDict):
    """The losses by name, so that the state of one keeps its place when others come and go.

    Shape suffixes: S = count sources, B = rows, D = documents of a row that are told apart,
    Q = sequences (B D; B where no loss asks for documents), L = local tokens of a row,
    E = experts.

    Attributes:
        count_sources: what has to be counted, where tokens go first; what someone needs at
            the end of the step before the rest.
        num_step_sources: how many of these someone needs at the end of the step.
        num_documents: D; 1 where every row is one sequence.
    """

    def __init__(self, configs: Sequence[AuxLoss.Config]) -> None:
        for config in configs:
            check_kind(config._owner)
        super().__init__({config._owner.type_name: config.build() for config in configs})
        self._of_sums: list[tuple[int, SumsLoss]] = []
        self._of_logits: list[tuple[int, LogitsLoss]] = []
        for index, loss in enumerate(self.values()):
            (self._of_sums if isinstance(loss, SumsLoss) else self._of_logits).append((index, loss))
        of_sums = [loss for _index, loss in self._of_sums]
        self.needs_step_counts = any(loss.needs_step_counts for loss in of_sums)
        self.needs_probabilities = bool(of_sums)
        self.num_documents = max([loss.config.documents or 1 for loss in of_sums], default=1)
        self._needs_whole_sums = not all(loss.linear for loss in of_sums)
        self._needs_whole_counts = any(loss.needs_counts for loss in of_sums)

    def wire(self, groups: RankGroups, *, padded: bool) -> None:
        """Take the process groups, and find out what has to be counted. Once, before training.

        Args:
            padded: batches say which tokens are valid.
        """
        self._groups = groups
        for loss in self.values():
            loss.wire(groups)
        self._padded = padded
        of_sums = [loss for _index, loss in self._of_sums]
        at_step_end = [self._source(loss) for loss in of_sums if loss.needs_step_counts]
        at_once = [self._source(loss) for loss in of_sums if loss.needs_counts]
        step_sources = dict.fromkeys([DISPATCHED, *([SELECTED] * padded), *at_step_end])
        self.count_sources = list(dict.fromkeys([*step_sources, *at_once]))
        self.num_step_sources = len(step_sources)
        self._source_indices = {
            name: self.count_sources.index(self._source(loss))
            for name, loss in self.items()
            if isinstance(loss, SumsLoss) and (loss.needs_counts or loss.needs_step_counts)
        }

    @property
    def valid_source(self) -> int:
        """Index in ``count_sources`` of the valid tokens that selected each expert."""
        return 1 if self._padded else 0

    def source_index(self, loss: SumsLoss) -> int:
        """Index in ``count_sources`` of what a loss counts."""
        return self._source_indices[loss.type_name]

    def _source(self, loss: SumsLoss) -> CountSource:
        source = CountSource(loss.count_from, loss.count_groups)
        return DISPATCHED if source == SELECTED and not self._padded else source

    def attach_to_logits(
        self, logits_BLE: torch.Tensor, record: RouterRecord | None, tokens: BatchTokens | None
    ) -> torch.Tensor:
        """Add the gradients of the losses of each token; records their raw values."""
        if not local_shard(logits_BLE).numel():
            return logits_BLE
        for index, loss in self._of_logits:
            assert record is not None
            local_BLE = local_shard(logits_BLE)
            with spmd.no_typecheck(), torch.no_grad():
                per_token_BL, saved = loss.per_token_and_saved(at_least_float32(local_BLE))
                share: float | torch.Tensor
                if tokens is None:
                    length = local_BLE.shape[1] * self._groups.sequence_shards
                    share = 1 / length
                    total, scale = per_token_BL.sum(), share
                else:
                    share = tokens.token_share_BL
                    total, scale = (per_token_BL * share).sum(), 1.0
                if not is_recomputation():
                    record.losses_A[index].add_(total, alpha=scale)
                weight = record.weights_A[index]
            attached_BLE = attach_to_logits(local_BLE, loss, saved, weight, share)
            logits_BLE = placed_as(logits_BLE, attached_BLE)
        return logits_BLE

    def coefficients(
        self,
        scores_BLE: torch.Tensor,
        counts_by_source: list[torch.Tensor],
        inverse_sums_BL: torch.Tensor | None,
        tokens: BatchTokens | None,
        record: RouterRecord,
        kept: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor | None:
        """Weighted gradient of the losses of sums in the sums; records their raw values.

        Args:
            scores_BLE: local scores.
            counts_by_source: local tokens per sequence and expert, int64 ``(Q, E)``.
            inverse_sums_BL: as for :func:`titan_moe_lb.balancing.losses.injection.gather_scores`.
            tokens: which are valid, and their sequences; None for whole rows.
            kept: makes a checkpointing policy save a tensor. What a repeated forward must not
                find out again goes through it before the first forward uses it: a compiler
                would otherwise leave it all to the backward.

        Returns:
            ``(B, E)`` or ``(1, E)``, float32, with documents ``(B, D, E)``; None without such
            a loss or without a token.
        """
        if not self._of_sums or not scores_BLE.numel():
            return None
        num_rows = scores_BLE.shape[0]
        documents = self.num_documents > 1
        own_QE = probability_sums(
            scores_BLE,
            sums_to_one=inverse_sums_BL is None,
            inverse_sums_BL=inverse_sums_BL,
            document_BL=tokens.document_BL if documents and tokens is not None else None,
            num_documents=self.num_documents,
        ).float()
        whole_QE = own_QE
        if self._needs_whole_sums:
            whole_QE = self._whole_sequences(own_QE)
        if self._needs_whole_counts:
            counts_by_source = self._whole_counts(counts_by_source)
        total = None
        for index, loss in self._of_sums:
            of_documents = loss.config.documents is not None and documents
            rows_of = _same if of_documents or not documents else self._rows
            sequences = self._sequences(loss, scores_BLE.shape[1], tokens)
            sums_BE = rows_of(own_QE if loss.linear else whole_QE)
            counts_BE = None
            if loss.needs_counts:
                counts_BE = rows_of(counts_by_source[self.source_index(loss)])
            if not loss.linear and isinstance(sequences.share, torch.Tensor):
                # A formula may divide by what an empty sequence has none of.
                sums_BE = sums_BE.masked_fill(sequences.share == 0, 1 / sums_BE.shape[-1])
            coefficients_BE = kept(loss.coefficients(sums_BE, counts_BE, sequences).float())
            if not is_recomputation():
                if loss.linear:
                    record.add_dot(index, coefficients_BE, sums_BE)
                else:
                    value = loss.value(sums_BE, counts_BE, sequences)
                    record.losses_A[index].add_(value, alpha=1 / self._groups.sequence_shards)
            if documents:  # (B, D, E), or broadcasting to it
                shape = (num_rows, -1) if of_documents else (-1, 1)
                coefficients_BE = coefficients_BE.unflatten(0, shape)
            weight = record.weights_A[index]
            if total is None:
                total = coefficients_BE * weight
            else:
                total = torch.addcmul(total, coefficients_BE, weight)
        if documents and total is not None:
            total = total.expand(num_rows, self.num_documents, -1)
        return total

    def _sequences(
        self, loss: SumsLoss, local_length: int, tokens: BatchTokens | None
    ) -> Sequences:
        if tokens is None:
            return Sequences(local_length * self._groups.sequence_shards, 1.0)
        if loss.config.documents is not None and tokens.documents is not None:
            return tokens.documents
        return tokens.rows

    def _rows(self, table_QE: torch.Tensor) -> torch.Tensor:
        return table_QE.unflatten(0, (-1, self.num_documents)).sum(dim=1)

    def _whole_counts(self, counts_by_source: list[torch.Tensor]) -> list[torch.Tensor]:
        if not self._groups.sequence:
            return counts_by_source
        return list(self._whole_sequences(torch.stack(counts_by_source)).unbind())

    def _whole_sequences(self, table: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks that hold parts of the same sequences."""
        for group in self._groups.sequence:
            table = all_reduce(table, "sum", group)
        return table


def _same(table: torch.Tensor) -> torch.Tensor:
    return table
