"""Balanced steps, interrupted by steps with hot experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from titan_moe_lb.balancing.forced_routing.base import require_at_least_one
from titan_moe_lb.balancing.forced_routing.functional import round_robin_ids
from titan_moe_lb.balancing.forced_routing.hot_experts import HotExperts


class Burst(HotExperts):
    """Route as ``round_robin``, and in every ``period``-th step as ``hot_experts``.

    The hot steps are logged as ``period``, ``2 period``, ..., also in a resumed job. A mean over
    many steady steps hides the cost of one such step and of the adaptation to it. Source: W7 of
    Megatron-LM PR 7488, whose period is 4.
    """

    type_name: ClassVar[str] = "burst"

    @dataclass(kw_only=True, slots=True)
    class Config(HotExperts.Config):
        """Settings of ``burst``."""

        period: int = 4
        """Steps from one burst to the next."""

        def __post_init__(self) -> None:
            HotExperts.Config.__post_init__(self)
            require_at_least_one("burst", period=self.period)

        def expert_lists(self) -> dict[str, list[int]]:
            """Add the order of the experts in a steady step."""
            return {**HotExperts.Config.expert_lists(self), "order": self.even_order()}

        def different_steps(self) -> list[int]:
            """Return a steady step and a burst."""
            return sorted({0, self.period - 1})

    order: torch.Tensor

    def deal(self, tokens_T, total_tokens, step) -> torch.Tensor:
        """Assign experts as in a steady step or as in a burst."""
        period = self.config.period
        steady_TK = self.order[round_robin_ids(tokens_T, self.top_k, self.num_experts)]
        burst_TK = super().deal(tokens_T, total_tokens, step)
        return torch.where(step % period == period - 1, burst_TK, steady_TK)
