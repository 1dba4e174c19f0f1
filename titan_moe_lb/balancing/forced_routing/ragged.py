"""Balanced experts with uneven loads from the source ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from titan_moe_lb.balancing.forced_routing.base import require_share
from titan_moe_lb.balancing.forced_routing.functional import ragged_rows, round_robin_ids
from titan_moe_lb.balancing.forced_routing.token_index import TokenIndexRouting
from titan_moe_lb.errors import JobError


class Ragged(TokenIndexRouting):
    """Balance the destinations of tokens and skew their sources.

    W4 of Megatron-LM PR 7488 isolates skew before the dispatch: "uneven per-rank source token
    counts, balanced destinations". Ranks of torchtitan hold equally many tokens, so the skew is in
    how many tokens each source sends to an expert. Every expert receives the same number of tokens
    of every dispatch, to within one.

    ``fraction`` of the tokens, spread evenly over all sources, choose by their source. The token at
    share x of the dispatch (its ranks and their sequences in order) selects successive experts from
    about ``(x + distance) E`` on. Rank r of an EP group sends these tokens to rank
    ``r + distance EP``: to itself at distance 0, half way around at 0.5. This holds to within one
    round of E / gcd(K, E) tokens, except for tokens whose K experts are on two ranks. At every EP
    degree, the all-to-all splits are as uneven as balanced destinations allow.
    """

    type_name: ClassVar[str] = "ragged"

    @dataclass(kw_only=True, slots=True)
    class Config(TokenIndexRouting.Config):
        """Settings of ``ragged``."""

        fraction: float
        """Share of the tokens that choose by their source, in (0, 1]."""

        distance: float = 0.5
        """Distance of their experts, as a share of all, in [0, 1); 0 is the own rank."""

        def __post_init__(self) -> None:
            require_share("ragged", self.fraction)
            if not 0 <= self.distance < 1:
                raise JobError(f"ragged distance is {self.distance}; it must be in [0, 1)")

    def deal(self, tokens_T, total_tokens, step) -> torch.Tensor:
        """Assign the round-robin experts of reordered rows."""
        rows_T = ragged_rows(
            tokens_T,
            self.top_k,
            self.num_experts,
            fraction=self.config.fraction,
            distance=self.config.distance,
            dispatched_tokens=total_tokens // (self._num_groups * self.config.num_micro_batches),
        )
        return round_robin_ids(rows_T, self.top_k, self.num_experts)
