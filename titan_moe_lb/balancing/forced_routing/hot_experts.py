"""Fixed share of all tokens on some experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from titan_moe_lb.balancing.forced_routing.base import require_at_least_one
from titan_moe_lb.balancing.forced_routing.functional import placed_experts
from titan_moe_lb.balancing.forced_routing.hot_share import HotShare


class HotExperts(HotShare):
    """Send ``fraction`` of all routed tokens to ``num_hot`` experts.

    Contiguous hot experts are the first ones, so the first EP ranks are hot. Spread hot experts are
    floor(i E / num_hot), equally many on every rank to within one: no rank is hot. Source: W1 and
    W3 of Megatron-LM PR 7488.
    """

    type_name: ClassVar[str] = "hot_experts"

    @dataclass(kw_only=True, slots=True)
    class Config(HotShare.Config):
        """Settings of ``hot_experts``."""

        num_hot: int
        """Number of hot experts."""

        placement: Literal["contiguous", "spread"] = "contiguous"
        """Hot experts: the first ones, or experts at equal distances over all."""

        def __post_init__(self) -> None:
            HotShare.Config.__post_init__(self)
            require_at_least_one(self._owner.type_name, num_hot=self.num_hot)

        def hot_experts(self) -> list[int]:
            """List the hot experts by their placement."""
            assert self.num_experts is not None
            return placed_experts(self.num_hot, self.num_experts, self.placement)
