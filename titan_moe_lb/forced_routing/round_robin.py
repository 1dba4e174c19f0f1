"""Exact balance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from titan_moe_lb.forced_routing.base import ForcedRouting
from titan_moe_lb.forced_routing.dealt import DealtRouting
from titan_moe_lb.forced_routing.functional import round_robin_ids


class RoundRobin(DealtRouting):
    """Every expert gets the same number of tokens of every micro-batch, to within one."""

    type_name: ClassVar[str] = "round_robin"

    @dataclass(kw_only=True, slots=True)
    class Config(ForcedRouting.Config):
        pass

    def deal(self, tokens_T: torch.Tensor, total_tokens: int) -> torch.Tensor:
        return round_robin_ids(tokens_T, self.top_k, self.num_experts)
