"""All losses of one router, applied together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import spmd_types as spmd
import torch
import torch.distributed._functional_collectives as funcol
from torchtitan.protocols.module import ModuleDict

from titan_moe_lb.errors import JobError
from titan_moe_lb.losses.base import AuxLoss, LogitsLoss, SumsLoss, check_kind
from titan_moe_lb.losses.functional import at_least_float32, probability_sums
from titan_moe_lb.losses.injection import attach_to_logits
from titan_moe_lb.parallel.local_shard import local_shard, placed_as
from titan_moe_lb.recording.recomputation import is_recomputation
from titan_moe_lb.recording.step_record import RouterRecord


class RouterLosses(ModuleDict):
    """The losses by name, so that the state of one keeps its place when others come and go.

    Shape suffixes: S = count sources, B = sequences, L = local tokens of a sequence,
    E = experts.

    Attributes:
        count_sources: what has to be counted, "selected" first, then "scores" if a loss
            counts from them.
        num_step_sources: how many of these someone needs at the end of the step.
    """

    def __init__(self, configs: Sequence[AuxLoss.Config], sequence_shards: int) -> None:
        """
        Args:
            sequence_shards: ranks that hold one sequence.
        """
        for config in configs:
            check_kind(config._owner)
        super().__init__({config._owner.type_name: config.build() for config in configs})
        self._of_sums: list[tuple[int, SumsLoss]] = []
        self._of_logits: list[tuple[int, LogitsLoss]] = []
        for index, loss in enumerate(self.values()):
            (self._of_sums if isinstance(loss, SumsLoss) else self._of_logits).append((index, loss))
        of_sums = [loss for _index, loss in self._of_sums]
        counting = [loss for loss in of_sums if loss.needs_counts or loss.needs_step_counts]
        others = {loss.count_from for loss in counting} - {"selected"}
        self.count_sources = ["selected", *sorted(others)]
        self.needs_step_counts = any(loss.needs_step_counts for loss in of_sums)
        at_step_end = {loss.count_from for loss in of_sums if loss.needs_step_counts}
        self.num_step_sources = 2 if "scores" in at_step_end else 1
        self.needs_probabilities = bool(of_sums)
        self._sequence_shards = sequence_shards
        self._sequence_groups: list = []

    def wire(self, sequence_groups: list, parallel_dims) -> None:
        """Take the process groups. Once, before training.

        Args:
            sequence_groups: over which the tokens of a sequence are split.
            parallel_dims: torchtitan's ``ParallelDims``.
        """
        self._sequence_groups = sequence_groups
        for loss in self.values():
            loss.wire_meshes(parallel_dims)

    def attach_to_logits(
        self, logits_BLE: torch.Tensor, record: RouterRecord | None
    ) -> torch.Tensor:
        """Add the gradients of the losses of each token; records their raw values."""
        if len(self) and record is None:
            raise JobError(
                "a router with aux losses is not wired: use titan_moe_lb.balanced(spec) for the "
                "ModelSpec, or call titan_moe_lb.step_hook.wire(routers, parallel_dims)"
            )
        for index, loss in self._of_logits:
            assert record is not None
            local_BLE = local_shard(logits_BLE)
            _require_announced_batch(loss, local_BLE.shape[0])
            length = local_BLE.shape[1] * self._sequence_shards
            scale = 1 / (length * loss.global_batch_size)
            with spmd.no_typecheck(), torch.no_grad():
                per_token_BL, saved = loss.per_token_and_saved(at_least_float32(local_BLE))
                if not is_recomputation():
                    record.losses_A[index].add_(per_token_BL.sum(), alpha=scale)
                weight = record.weights_A[index]
            attached_BLE = attach_to_logits(local_BLE, loss, saved, weight, scale)
            logits_BLE = placed_as(logits_BLE, attached_BLE)
        return logits_BLE

    def coefficients(
        self,
        scores_BLE: torch.Tensor,
        counts_SBE: torch.Tensor,
        inverse_sums_BL: torch.Tensor | None,
        record: RouterRecord,
        kept: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor | None:
        """Weighted gradient of the losses of sums in the sums; records their raw values.

        Args:
            scores_BLE: local scores.
            counts_SBE: local tokens per source, sequence and expert, int64.
            inverse_sums_BL: as for :func:`titan_moe_lb.losses.injection.gather_scores`.
            kept: makes a checkpointing policy save a tensor. What a repeated forward must not
                find out again goes through it before the first forward uses it: a compiler
                would otherwise leave it all to the backward.

        Returns:
            ``(B, E)`` or ``(1, E)``, float32; None without such a loss.
        """
        if not self._of_sums:
            return None
        length = scores_BLE.shape[1] * self._sequence_shards
        own_BE = probability_sums(
            scores_BLE, sums_to_one=inverse_sums_BL is None, inverse_sums_BL=inverse_sums_BL
        ).float()
        whole_BE = own_BE
        if not all(loss.linear for _index, loss in self._of_sums):
            whole_BE = self._whole_sequences(own_BE)
        if any(loss.needs_counts for _index, loss in self._of_sums):
            counts_SBE = self._whole_sequences(counts_SBE)
        total_BE = None
        for index, loss in self._of_sums:
            _require_announced_batch(loss, scores_BLE.shape[0])
            counts_BE = None
            if loss.needs_counts:
                counts_BE = counts_SBE[self.count_sources.index(loss.count_from)]
            sums_BE = own_BE if loss.linear else whole_BE
            coefficients_BE = kept(loss.coefficients(sums_BE, counts_BE, length).float())
            if not is_recomputation():
                if loss.linear:
                    record.add_dot(index, coefficients_BE, own_BE)
                else:
                    value = loss.value(whole_BE, counts_BE, length)
                    record.losses_A[index].add_(value, alpha=1 / self._sequence_shards)
            weight = record.weights_A[index]
            if total_BE is None:
                total_BE = coefficients_BE * weight
            else:
                total_BE = torch.addcmul(total_BE, coefficients_BE, weight)
        return total_BE

    def _whole_sequences(self, table: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks that hold parts of the same sequences."""
        for group in self._sequence_groups:
            table = funcol.all_reduce(table, "sum", group)
        return table


def _require_announced_batch(loss: AuxLoss, num_sequences: int) -> None:
    """A loss is a mean over the sequences that the job has announced."""
    if loss.micro_batch_size is not None and num_sequences != loss.micro_batch_size:
        raise JobError(
            f"the aux losses were bound to micro-batches of {loss.micro_batch_size} sequences and "
            f"get {num_sequences}: their weight would be wrong; set training.local_batch_size (or "
            "parallelism.pipeline_parallel_microbatch_size) to what the loop feeds"
        )
