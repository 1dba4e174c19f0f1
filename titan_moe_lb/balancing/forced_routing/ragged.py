"""Balanced experts, unevenly fed by the source ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from titan_moe_lb.balancing.forced_routing.base import require_share
from titan_moe_lb.balancing.forced_routing.functional import ragged_rows, round_robin_ids
from titan_moe_lb.balancing.forced_routing.token_index import TokenIndexRouting
from titan_moe_lb.errors import JobError


class Ragged(TokenIndexRouting):
    """Balances the destinations of tokens and skews their sources.

    W4 of Megatron-LM PR 7488 isolates skew before the dispatch: "uneven per-rank source token
    counts, balanced destinations". Ranks of torchtitan hold equally many tokens, so the skew is in
    how much each source sends to an expert. Every expert gets the same number of tokens of every
    dispatch, to within one. ``fraction`` of them, evenly taken from all sources, choose by their
    source: the token at share x of the dispatch (its ranks and their sequences in order) takes
    successive experts from about ``(x + distance) E`` on. Rank r of an EP group sends these tokens
    to rank ``r + distance EP``: with 0 to itself, with 0.5 half way round. This holds to within
    one round of E / gcd(K, E) tokens, except for tokens whose K experts are on two ranks. The
    all-to-all splits are as uneven as balanced destinations allow, at every EP degree.
    """

    type_name: ClassVar[str] = "ragged"

    @dataclass(kw_only=True, slots=True)
    class Config(TokenIndexRouting.Config):
        fraction: float
        """Share of the tokens that choose by their source, in (0, 1]."""

        distance: float = 0.5
        """How far away their experts are, as a share of all, in [0, 1); 0 is the own rank."""

        def __post_init__(self) -> None:
            require_share("ragged", self.fraction)
            if not 0 <= self.distance < 1:
                raise JobError(f"ragged distance is {self.distance}; it must be in [0, 1)")

    def deal(self, tokens_T, total_tokens, step) -> torch.Tensor:
        rows_T = ragged_rows(
            tokens_T,
            self.top_k,
            self.num_experts,
            fraction=self.config.fraction,
            distance=self.config.distance,
            dispatched_tokens=total_tokens // (self._num_groups * self.config.num_micro_batches),
        )
        return round_robin_ids(rows_T, self.top_k, self.num_experts)
