"""Exact balance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from titan_moe_lb.forced_routing.base import ForcedRouting
from titan_moe_lb.forced_routing.functional import round_robin_ids


class RoundRobin(ForcedRouting):
    """Every expert gets the same number of tokens of every micro-batch, to within one.

    The ranks of an EP group deal as one, each going on where the one before it ends.
    """

    type_name: ClassVar[str] = "round_robin"

    @dataclass(kw_only=True, slots=True)
    class Config(ForcedRouting.Config):
        def example_ids(self, num_tokens: int) -> torch.Tensor:
            """``(T, K)`` choices of the tokens of an EP group."""
            assert self.top_k is not None and self.num_experts is not None
            return round_robin_ids(num_tokens, self.top_k, self.num_experts)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._expert_parallel_rank = 0

    def wire(self, parallel_dims, layer: int) -> None:
        if parallel_dims.ep_enabled:
            self._expert_parallel_rank = parallel_dims.get_mesh("ep").get_local_rank()

    def forward(self, scores_BLE, forward_number, limit_groups) -> torch.Tensor:
        B, L, E = scores_BLE.shape
        first = self._expert_parallel_rank * B * L
        ids_TK = round_robin_ids(B * L, self.top_k, E, first_token=first, device=scores_BLE.device)
        return ids_TK.view(B, L, self.top_k)
