"""Small tables of a forward: tokens of each expert, and sums of probabilities. Torch alone.

Shape suffixes: B = rows, L = local tokens of a row, E = experts, K = top_k, D = documents of
a row, Q = sequences (B D), S = sources.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch

from titan_moe_lb.balancing.valid_tokens.batch_tokens import BatchTokens, Sequences
from titan_moe_lb.functional import add_tokens_, probability_sums
from titan_moe_lb.parallel.rank_groups import RankGroups
from titan_moe_lb.upstream.torch_internals import all_reduce


class CountSource(NamedTuple):
    """What is counted for each sequence and expert."""

    choice: Literal["dispatched", "selected", "scores"]
    """Every token where it goes; valid tokens where they go; valid tokens by the top-K of
    the unbiased scores."""

    groups: int = 1
    """See :attr:`titan_moe_lb.balancing.losses.base.SumsLoss.count_groups`."""


DISPATCHED = CountSource("dispatched")
SELECTED = CountSource("selected")


class CountSources:
    """The sources that a router counts: dispatched tokens first, and those that someone needs at
    the end of a step before the rest.

    Attributes:
        num_at_step_end: how many someone needs at the end of a step.
        valid: index of the valid tokens that selected each expert.
    """

    def __init__(
        self, at_step_end: Sequence[CountSource], at_once: Sequence[CountSource], *, padded: bool
    ) -> None:
        """
        Args:
            at_step_end: what losses count until the end of a step.
            at_once: what losses count in each forward.
            padded: batches say which tokens are valid.
        """
        self._padded = padded
        step = dict.fromkeys([DISPATCHED, *map(self._known, (SELECTED, *at_step_end))])
        self._sources = list(dict.fromkeys([*step, *map(self._known, at_once)]))
        self.num_at_step_end = len(step)
        self.valid = self.index(SELECTED)

    def _known(self, source: CountSource) -> CountSource:
        return DISPATCHED if source == SELECTED and not self._padded else source

    def index(self, source: CountSource) -> int:
        """Place of a source in the tables."""
        return self._sources.index(self._known(source))

    def count(
        self,
        ids_BLK: torch.Tensor,
        unbiased_ids_BLK: Callable[[], torch.Tensor],
        tokens: BatchTokens | None,
        *,
        num_experts: int,
        num_documents: int,
        one: torch.Tensor,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Local tokens per source, sequence and expert.

        Args:
            ids_BLK: selected experts, int64.
            unbiased_ids_BLK: computes the top-K of the unbiased scores, if a source needs it.
            tokens: which are valid; None for all.
            num_documents: D; 1 where a row is one sequence.
            one: 1, int64 ``()``.

        Returns:
            int64 ``(S, Q, E)``, and its S rows. A backward needs the rows: they are the results of
            the additions. A graph that recomputes a tensor for its backward repeats the operators
            that lead to it, and not what was done in place to a tensor that it is a part of.
        """
        num_rows = ids_BLK.shape[0]
        counts_SQE = ids_BLK.new_zeros(len(self._sources), num_rows * num_documents, num_experts)
        by_source: list[torch.Tensor] = []
        for source, counts_QE in zip(self._sources, counts_SQE.unbind(), strict=True):
            counted_BLK = unbiased_ids_BLK() if source.choice == "scores" else ids_BLK
            valid_BL1 = one
            if tokens is not None and source.choice != "dispatched":
                valid_BL1 = tokens.valid_BL.unsqueeze(-1)
            if source.groups > 1:
                size = num_experts // source.groups
                counted_BLK, reached = _experts_of_reached_groups(counted_BLK, source.groups, size)
                valid_BL1 = valid_BL1 * reached
            if num_documents > 1:
                assert tokens is not None and tokens.document_BL is not None
                counted_BLK = counted_BLK + tokens.document_BL.unsqueeze(-1) * num_experts
            rows_BE = counts_QE.view(num_rows, num_documents * num_experts)
            by_source.append(add_tokens_(rows_BE, counted_BLK, valid_BL1).view_as(counts_QE))
        return counts_SQE, by_source


def _experts_of_reached_groups(
    ids_BLK: torch.Tensor, groups: int, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """All experts, and whether each token has one of the same group, both ``(B, L, E)`` int64."""
    reached_BLG = ids_BLK.new_zeros(*ids_BLK.shape[:2], groups).scatter_(-1, ids_BLK // size, 1)
    experts_E = torch.arange(groups * size, device=ids_BLK.device)
    reached_BLE = reached_BLG.repeat_interleave(size, dim=-1)
    return experts_E.expand_as(reached_BLE), reached_BLE


class SequenceTables:
    """Tables of one forward that losses of sums read, for each row or each document."""

    def __init__(
        self,
        scores_BLE: torch.Tensor,
        inverse_sums_BL: torch.Tensor | None,
        counts_by_source: list[torch.Tensor],
        tokens: BatchTokens | None,
        *,
        num_documents: int,
        groups: RankGroups,
        whole_sums: bool,
        whole_counts: bool,
    ) -> None:
        """
        Args:
            scores_BLE: local scores.
            inverse_sums_BL: see :func:`titan_moe_lb.functional.gather_scores`.
            counts_by_source: local tokens of each expert, int64 ``(Q, E)`` each.
            tokens: which are valid, and their sequences; None for whole rows.
            num_documents: D; 1 where every row is one sequence.
            whole_sums: a loss needs the sums of whole sequences.
            whole_counts: the same of the counts.
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
            self._counts = list(self._over_ranks(torch.stack(counts_by_source)).unbind())

    def _over_ranks(self, table: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks that hold parts of the same sequences."""
        for group in self._groups.sequence:
            table = all_reduce(table, "sum", group)
        return table

    def sequences(self, *, documents: bool) -> Sequences:
        """The rows, or their documents."""
        if self._tokens is None:
            return Sequences(self._length * self._groups.sequence_shards, 1.0)
        of_documents = self._tokens.documents if documents else None
        return self._tokens.rows if of_documents is None else of_documents

    def sums(self, *, documents: bool, whole: bool) -> torch.Tensor:
        """Sums of the probabilities of each sequence ``(B, E)``, of its local or of all tokens."""
        table = self._whole_QE if whole else self._local_QE
        return self._rows(table, documents)

    def counts(self, source: int, *, documents: bool) -> torch.Tensor:
        """Tokens of each expert in whole sequences ``(B, E)``."""
        return self._rows(self._counts[source], documents)

    def _rows(self, table_QE: torch.Tensor, documents: bool) -> torch.Tensor:
        if documents or self._num_documents == 1:
            return table_QE
        return table_QE.unflatten(0, (-1, self._num_documents)).sum(dim=1)
