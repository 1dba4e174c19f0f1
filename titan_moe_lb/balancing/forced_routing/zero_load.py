"""Experts and ranks without a token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from titan_moe_lb.balancing.forced_routing.base import require_at_least_one
from titan_moe_lb.balancing.forced_routing.functional import placed_experts, round_robin_ids
from titan_moe_lb.balancing.forced_routing.token_index import TokenIndexRouting


class ZeroLoad(TokenIndexRouting):
    """Send no token to ``num_zero`` experts and the same number to the others, to within one.

    Contiguous experts without load are the first ones; if ``num_zero`` is E / EP, the first EP rank
    receives no token. Spread ones are floor(i E / num_zero), equally many on every rank to within
    one. Source: W5 of Megatron-LM PR 7488, where the first half receives no token.
    """

    type_name: ClassVar[str] = "zero_load"

    @dataclass(kw_only=True, slots=True)
    class Config(TokenIndexRouting.Config):
        """Settings of ``zero_load``."""

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
