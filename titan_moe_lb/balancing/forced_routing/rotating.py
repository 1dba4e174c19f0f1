"""Hot experts that change from step to step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from titan_moe_lb.balancing.forced_routing.base import require_at_least_one
from titan_moe_lb.balancing.forced_routing.hot_share import HotShare


class Rotating(HotShare):
    """Route like ``hot_experts`` with neighboring hot experts; every ``period`` steps the next are hot.

    In step s, counted from 0, experts ``(s // period) num_hot + [0, num_hot)`` modulo E are hot,
    also in a resumed job. An expert placement planned from past loads is out of date after each
    change: this workload tests that. Source: W6 of Megatron-LM PR 7488, whose period is 3.
    """

    type_name: ClassVar[str] = "rotating"

    @dataclass(kw_only=True, slots=True)
    class Config(HotShare.Config):
        """Settings of hot experts that change."""

        num_hot: int
        """Number of hot experts."""

        period: int = 3
        """Steps until the next experts are hot."""

        def __post_init__(self) -> None:
            HotShare.Config.__post_init__(self)
            require_at_least_one("rotating", num_hot=self.num_hot, period=self.period)

        def hot_experts(self) -> list[int]:
            """List the hot experts of step 0."""
            return list(range(self.num_hot))

        def different_steps(self) -> list[int]:
            """Return one step for each set of hot experts."""
            assert self.num_experts is not None
            places = self.num_experts // math.gcd(self.num_experts, self.num_hot)
            return [place * self.period for place in range(places)]

    def deal(self, tokens_T, total_tokens, step) -> torch.Tensor:
        """Assign the experts of step 0, shifted by the step."""
        first = step // self.config.period * self.config.num_hot
        return (super().deal(tokens_T, total_tokens, step) + first) % self.num_experts
