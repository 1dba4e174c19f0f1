"""Experts and ranks without a token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from titan_moe_lb.balancing.forced_routing.base import require_at_least_one
from titan_moe_lb.balancing.forced_routing.functional import placed_experts, round_robin_ids
from titan_moe_lb.balancing.forced_routing.token_index import TokenIndexRouting


class ZeroLoad(TokenIndexRouting):
    """Sends no token to ``num_zero`` experts and the same number to the others, to within one.

    Contiguous, these are the first experts; with ``num_zero`` E / EP the first EP rank gets
    nothing. Spread, they are experts floor(i E / num_zero), as many on every rank to within one.
    W5 of Megatron-LM PR 7488, where the first half gets nothing.
    """

    type_name: ClassVar[str] = "zero_load"

    @dataclass(kw_only=True, slots=True)
    class Config(TokenIndexRouting.Config):
        num_zero: int
        """Experts without load."""

        placement: Literal["contiguous", "spread"] = "contiguous"
        """The first experts, or at equal distances over all."""

        def __post_init__(self) -> None:
            require_at_least_one("zero_load", num_zero=self.num_zero)

        def expert_lists(self) -> dict[str, list[int]]:
            assert self.num_experts is not None
            zero = set(placed_experts(self.num_zero, self.num_experts, self.placement))
            # Runs of successive experts, as a group limit needs them, would have gaps.
            order = range(self.num_experts) if self.open_groups else self.even_order()
            return {"loaded_experts": [e for e in order if e not in zero]}

    loaded_experts: torch.Tensor

    def deal(self, tokens_T, total_tokens, step) -> torch.Tensor:
        places_TK = round_robin_ids(tokens_T, self.top_k, self.loaded_experts.numel())
        return self.loaded_experts[places_TK]
