"""Strategies that give every expert with load the same number of tokens, to within one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from titan_moe_lb.balancing.forced_routing.base import require_at_least_one, require_share
from titan_moe_lb.balancing.forced_routing.functional import (
    placed_experts,
    ragged_rows,
    round_robin_ids,
)
from titan_moe_lb.balancing.forced_routing.token_index import TokenIndexRouting
from titan_moe_lb.errors import JobError


class RoundRobin(TokenIndexRouting):
    """Send every expert the same number of tokens of every dispatch, to within one.

    The same holds for every EP rank: successive experts are on different ranks, and no rank is idle
    if there are at least as many choices as ranks. (In the order of the experts, all first tokens
    would go to the first ranks: vllm-project/afd-plugin issue 156, sgl-project/sglang PR 37741.) If
    the model limits expert groups, a token selects runs of successive experts, and the ranks are
    equal to within one run. Source: W0 of Megatron-LM PR 7488.
    """

    type_name: ClassVar[str] = "round_robin"

    @dataclass(kw_only=True, slots=True)
    class Config(TokenIndexRouting.Config):
        def expert_lists(self) -> dict[str, list[int]]:
            """List all experts in an even order."""
            return {"order": self.even_order()}

    order: torch.Tensor

    def deal(self, tokens_T, total_tokens, step) -> torch.Tensor:
        """Assign the experts in turn, in the even order."""
        return self.order[round_robin_ids(tokens_T, self.top_k, self.num_experts)]


class ZeroLoad(TokenIndexRouting):
    """Send no token to ``num_zero`` experts and the same number to the others, to within one.

    Contiguous experts without load are the first ones; if ``num_zero`` is E / EP, the first EP rank
    receives no token. Spread ones are floor(i E / num_zero), equally many on every rank to within
    one. Source: W5 of Megatron-LM PR 7488, where the first half receives no token.
    """

    type_name: ClassVar[str] = "zero_load"

    @dataclass(kw_only=True, slots=True)
    class Config(TokenIndexRouting.Config):
        num_zero: int
        """Number of experts without load."""

        placement: Literal["contiguous", "spread"] = "contiguous"
        """Experts without load: the first ones, or experts at equal distances over all."""

        def __post_init__(self) -> None:
            require_at_least_one("zero_load", num_zero=self.num_zero)

        def expert_lists(self) -> dict[str, list[int]]:
            """List the experts with load."""
            assert self.num_experts is not None
            zero = set(placed_experts(self.num_zero, self.num_experts, self.placement))
            # In the even order, the runs of successive experts for a group limit would have gaps.
            order = range(self.num_experts) if self.open_groups else self.even_order()
            return {"loaded_experts": [e for e in order if e not in zero]}

    loaded_experts: torch.Tensor

    def deal(self, tokens_T, total_tokens, step) -> torch.Tensor:
        """Assign the experts with load in turn."""
        places_TK = round_robin_ids(tokens_T, self.top_k, self.loaded_experts.numel())
        return self.loaded_experts[places_TK]


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
