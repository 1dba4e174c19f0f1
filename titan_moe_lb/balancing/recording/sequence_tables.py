"""Small tables of a forward: tokens of each expert, and sums of probabilities. Torch alone.

Shape suffixes: B = rows, L = local tokens of a row, E = experts, K = top_k, D = documents of
a row, Q = sequences (B D), S = sources.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch

from titan_moe_lb.balancing.recording.recomputation import is_recomputation
from titan_moe_lb.balancing.recording.step_record import RouterRecord
from titan_moe_lb.balancing.valid_tokens.batch_tokens import BatchTokens, Sequences
from titan_moe_lb.functional import add_tokens_, probability_sums
from titan_moe_lb.parallel.rank_groups import RankGroups
from titan_moe_lb.upstream.torch_internals import all_reduce


class CountSource(NamedTuple):
    """Definition of the tokens that are counted for each sequence and expert."""

    choice: Literal["dispatched", "selected", "scores"]
    """``dispatched``: every token at its experts; ``selected``: valid tokens at their experts;
    ``scores``: valid tokens at the top-K of the unbiased scores."""

    groups: int = 1
    """See :attr:`titan_moe_lb.balancing.losses.base.SumsLoss.count_groups`."""


DISPATCHED = CountSource("dispatched")
SELECTED = CountSource("selected")


class CountSources:
    """Sources that a router counts, in the order of its tables.

    Dispatched tokens come first, then the other sources that are needed at the end of a step, then
    the rest.

    Attributes:
        num_at_step_end: number of sources that are needed at the end of a step.
        valid: index of the source of valid tokens that selected each expert.
    """

    def __init__(
        self,
        at_step_end: Sequence[CountSource],
        at_once: Sequence[CountSource],
        *,
        padded: bool,
        num_documents: int,
    ) -> None:
        self._padded, self._num_documents = padded, num_documents
        step = dict.fromkeys([DISPATCHED, *map(self._known, (SELECTED, *at_step_end))])
        self._at_once = dict.fromkeys(map(self._known, at_once))
        self._sources = list({**step, **self._at_once})
        self.num_at_step_end = len(step)
        self.valid = self.index(SELECTED)

    def _known(self, source: CountSource) -> CountSource:
        return DISPATCHED if source == SELECTED and not self._padded else source

    def index(self, source: CountSource) -> int:
        """Return the index of a source in the tables."""
        return self._sources.index(self._known(source))

    def count(
        self,
        ids_BLK: torch.Tensor,
        unbiased_ids_BLK: Callable[[], torch.Tensor],
        tokens: BatchTokens | None,
        record: RouterRecord,
    ) -> list[torch.Tensor | None]:
        """Count the local tokens of each source and expert.

        What a step end needs is added to the record, once, and so are the experts themselves in a job
        that records them; a recomputed forward adds nothing. What a loss needs at once is counted for
        each sequence.

        ``unbiased_ids_BLK`` computes the top-K of the unbiased scores, if a source needs it.

        Returns:
            int64 ``(Q, E)`` for each source; None for one that no loss needs at once.
        """
        num_rows, num_experts = ids_BLK.shape[0], record.num_experts
        is_first_run = not is_recomputation()
        if is_first_run:
            record.note_ids(ids_BLK)
        by_source: list[torch.Tensor | None] = []
        for index, source in enumerate(self._sources):
            counted_BLK = unbiased_ids_BLK() if source.choice == "scores" else ids_BLK
            valid_BL1 = record.one
            if tokens is not None and source.choice != "dispatched":
                valid_BL1 = tokens.valid_BL.unsqueeze(-1)
            if source.groups > 1:
                size = num_experts // source.groups
                counted_BLK, reached = _experts_of_reached_groups(counted_BLK, source.groups, size)
                valid_BL1 = valid_BL1 * reached
            if index < self.num_at_step_end and is_first_run:
                record.add_counts(index, counted_BLK, valid_BL1)
            if source not in self._at_once:
                by_source.append(None)
                continue
            if self._num_documents > 1:
                assert tokens is not None and tokens.document_BL is not None
                counted_BLK = counted_BLK + tokens.document_BL.unsqueeze(-1) * num_experts
            rows_BE = ids_BLK.new_zeros(num_rows, self._num_documents * num_experts)
            add_tokens_(rows_BE, counted_BLK, valid_BL1)
            by_source.append(rows_BE.view(-1, num_experts))
        return by_source


def _experts_of_reached_groups(
    ids_BLK: torch.Tensor, groups: int, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """List all experts, and mark those in a group that the token reaches, ``(B, L, E)`` int64."""
    reached_BLG = ids_BLK.new_zeros(*ids_BLK.shape[:2], groups).scatter_(-1, ids_BLK // size, 1)
    experts_E = torch.arange(groups * size, device=ids_BLK.device)
    reached_BLE = reached_BLG.repeat_interleave(size, dim=-1)
    return experts_E.expand_as(reached_BLE), reached_BLE


class SequenceTables:
    """Tables of one forward for losses of sums, for each row or each document."""

    def __init__(
        self,
        scores_BLE: torch.Tensor,
        inverse_sums_BL: torch.Tensor | None,
        counts_by_source: list[torch.Tensor | None],
        tokens: BatchTokens | None,
        *,
        num_documents: int,
        groups: RankGroups,
        whole_sums: bool,
        whole_counts: bool,
    ) -> None:
        """Compute the tables.

        Local counts ``(Q, E)`` are None for a source that no loss of this forward needs.
        ``whole_sums`` and ``whole_counts``: a loss needs those of whole sequences, not of this
        rank's parts.
        """
        self._tokens, self._groups = tokens, groups
        self._length, self._num_documents = scores_BLE.shape[1], num_documents
        self._local_QE = self._whole_QE = probability_sums(
            scores_BLE,
            sums_to_one=inverse_sums_BL is None,
            inverse_sums_BL=inverse_sums_BL,
            document_BL=None if tokens is None else tokens.document_BL,
            num_documents=num_documents,
        ).float()
        self._counts = counts_by_source
        if whole_sums:
            self._whole_QE = self._over_ranks(self._local_QE)
        if whole_counts and groups.sequence:
            known = [table for table in counts_by_source if table is not None]
            whole = iter(self._over_ranks(torch.stack(known)).unbind())
            self._counts = [None if table is None else next(whole) for table in counts_by_source]

    def _over_ranks(self, table: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks that hold parts of the same sequences."""
        for group in self._groups.sequence:
            table = all_reduce(table, "sum", group)
        return table

    def sequences(self, *, documents: bool) -> Sequences:
        """Return the rows, or their documents, as sequences."""
        if self._tokens is None:
            return Sequences(self._length * self._groups.sequence_shards, 1.0)
        of_documents = self._tokens.documents if documents else None
        return self._tokens.rows if of_documents is None else of_documents

    def sums(self, *, documents: bool, whole: bool) -> torch.Tensor:
        """Return the probability sums of each sequence ``(B, E)``, over local or all tokens."""
        table = self._whole_QE if whole else self._local_QE
        return self._rows(table, documents)

    def counts(self, source: int, *, documents: bool) -> torch.Tensor:
        """Return the tokens of each expert in whole sequences ``(B, E)``."""
        table = self._counts[source]
        assert table is not None
        return self._rows(table, documents)

    def _rows(self, table_QE: torch.Tensor, documents: bool) -> torch.Tensor:
        if documents or self._num_documents == 1:
            return table_QE
        return table_QE.unflatten(0, (-1, self._num_documents)).sum(dim=1)
