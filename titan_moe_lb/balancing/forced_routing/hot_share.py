"""Base class of strategies that send a fixed share of all tokens to hot experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from titan_moe_lb.balancing.forced_routing.base import require_share
from titan_moe_lb.balancing.forced_routing.functional import hot_share_ids
from titan_moe_lb.balancing.forced_routing.token_index import TokenIndexRouting


class HotShare(TokenIndexRouting):
    """Send ``fraction`` of all routed tokens to the hot experts and the rest to the cold ones.

    The share holds for every dispatch and for the global batch, to within one token. Hot experts
    share their tokens evenly, and so do cold ones.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(TokenIndexRouting.Config):
        """Settings of a strategy with hot experts."""

        fraction: float
        """Share of all routed tokens that hot experts receive, in (0, 1]."""

        def __post_init__(self) -> None:
            require_share(self._owner.type_name, self.fraction)

        def hot_experts(self) -> list[int]:
            """List the hot experts, ascending."""
            raise NotImplementedError

        def expert_lists(self) -> dict[str, list[int]]:
            """List the hot and the cold experts."""
            assert self.num_experts is not None
            hot = self.hot_experts()
            cold = sorted(set(range(self.num_experts)) - set(hot))
            return {"hot_experts": hot, "cold_experts": cold}

    hot_experts: torch.Tensor
    cold_experts: torch.Tensor

    def deal(self, tokens_T, total_tokens, step) -> torch.Tensor:
        """Assign the fixed share of the choices to the hot experts."""
        return hot_share_ids(
            tokens_T,
            self.top_k,
            self.hot_experts,
            self.cold_experts,
            num_hot_choices=round(self.config.fraction * total_tokens * self.top_k),
            total_tokens=total_tokens,
        )
