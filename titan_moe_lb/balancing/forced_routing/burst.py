"""Balance, and now and then a step of heat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from titan_moe_lb.balancing.forced_routing.base import require_at_least_one
from titan_moe_lb.balancing.forced_routing.functional import round_robin_ids
from titan_moe_lb.balancing.forced_routing.hot_experts import HotExperts


class Burst(HotExperts):
    """As ``round_robin``, but every ``period``-th step is as ``hot_experts``.

    Those are the steps logged as ``period``, ``2 period``, ...; a resumed job keeps to them.
    What is measured over many steady steps hides what one such step costs, and what it costs
    to adapt to it and back. W7 of Megatron-LM PR 7488, whose period is 4.
    """

    type_name: ClassVar[str] = "burst"

    @dataclass(kw_only=True, slots=True)
    class Config(HotExperts.Config):
        period: int = 4
        """Steps from one burst to the next."""

        def __post_init__(self) -> None:
            HotExperts.Config.__post_init__(self)
            require_at_least_one("burst", period=self.period)

        def expert_lists(self) -> dict[str, list[int]]:
            return {**HotExperts.Config.expert_lists(self), "order": self.even_order()}

        def different_steps(self) -> list[int]:
            return sorted({0, self.period - 1})

    order: torch.Tensor

    def deal(self, tokens_T, total_tokens, step) -> torch.Tensor:
        period = self.config.period
        steady_TK = self.order[round_robin_ids(tokens_T, self.top_k, self.num_experts)]
        burst_TK = super().deal(tokens_T, total_tokens, step)
        return torch.where(step % period == period - 1, burst_TK, steady_TK)
