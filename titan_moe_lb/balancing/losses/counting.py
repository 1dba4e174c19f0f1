"""Counting the tokens of each expert, as losses, bias rules and metrics need them. Torch alone.

Shape suffixes: B = rows, L = local tokens of a row, E = experts, K = top_k, D = documents of
a row, Q = sequences (B D), S = sources.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch

from titan_moe_lb.balancing.valid_tokens.batch_tokens import BatchTokens
from titan_moe_lb.functional import add_tokens_


class CountSource(NamedTuple):
    """What is counted for each sequence and expert."""

    choice: Literal["dispatched", "selected", "scores"]
    """Every token where it goes; valid tokens where they go; valid tokens by the top-K of
    the unbiased scores."""

    groups: int = 1
    """See :attr:`titan_moe_lb.balancing.losses.base.SumsLoss.count_groups`."""


DISPATCHED = CountSource("dispatched")
SELECTED = CountSource("selected")


def count(
    sources: Sequence[CountSource],
    ids_BLK: torch.Tensor,
    unbiased_ids_BLK: Callable[[], torch.Tensor],
    *,
    num_experts: int,
    tokens: BatchTokens | None,
    num_documents: int,
    one: torch.Tensor,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Local tokens per source, sequence and expert.

    Args:
        sources: what to count.
        ids_BLK: selected experts, int64.
        unbiased_ids_BLK: the top-K of the unbiased scores, asked where a source needs it.
        tokens: which are valid; None for all.
        num_documents: D; 1 where a row is one sequence.
        one: 1, int64 ``()``.

    Returns:
        int64 ``(S, Q, E)``, and its S rows. A backward needs the rows: they are the results of the
        additions, and a graph that recomputes a tensor for its backward repeats the operators
        that lead to it, and not what was done in place to a tensor that it is a part of.
    """
    num_rows = ids_BLK.shape[0]
    counts_SQE = ids_BLK.new_zeros(len(sources), num_rows * num_documents, num_experts)
    by_source: list[torch.Tensor] = []
    document_BL1 = None
    if num_documents > 1:
        assert tokens is not None and tokens.document_BL is not None
        document_BL1 = tokens.document_BL.unsqueeze(-1)
    for source, counts_QE in zip(sources, counts_SQE.unbind(), strict=True):
        counted_BLK = unbiased_ids_BLK() if source.choice == "scores" else ids_BLK
        valid_BL1 = one
        if tokens is not None and source.choice != "dispatched":
            valid_BL1 = tokens.valid_BL.unsqueeze(-1)
        if source.groups > 1:
            size = num_experts // source.groups
            counted_BLK, reached = _experts_of_reached_groups(counted_BLK, source.groups, size)
            valid_BL1 = valid_BL1 * reached
        if document_BL1 is not None:
            counted_BLK = counted_BLK + document_BL1 * num_experts
        rows_BE = counts_QE.view(num_rows, num_documents * num_experts)
        sums_BE = add_tokens_(rows_BE, counted_BLK, valid_BL1)
        by_source.append(sums_BE.view_as(counts_QE))
    return counts_SQE, by_source


def _experts_of_reached_groups(
    ids_BLK: torch.Tensor, groups: int, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """All experts, and whether each token has one of the same group, both ``(B, L, E)`` int64."""
    reached_BLG = ids_BLK.new_zeros(*ids_BLK.shape[:2], groups).scatter_(-1, ids_BLK // size, 1)
    experts_E = torch.arange(groups * size, device=ids_BLK.device)
    reached_BLE = reached_BLG.repeat_interleave(size, dim=-1)
    return experts_E.expand_as(reached_BLE), reached_BLE
