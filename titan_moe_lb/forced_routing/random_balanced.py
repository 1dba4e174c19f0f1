"""Balance on average: every token draws its experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from titan_moe_lb.forced_routing.base import ForcedRouting
from titan_moe_lb.forced_routing.functional import uniform
from titan_moe_lb.forced_routing.random_stream import RandomStream


class RandomBalanced(ForcedRouting):
    """Top-k of random logits, new ones for every token and forward, others on every rank.

    The load is balanced up to chance. The scores, and so the gradients, are the
    router's own: the draw passes gradients straight through. Group-limited routing
    is applied to the random logits.
    """

    type_name: ClassVar[str] = "random_balanced"

    @dataclass(kw_only=True, slots=True)
    class Config(ForcedRouting.Config):
        seed: int = 0

        def describe(self) -> str:
            return f"random_balanced (seed {self.seed})"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.stream = RandomStream.Config(seed=config.seed).build()

    def wire(self, parallel_dims, layer: int) -> None:
        self.stream.wire(parallel_dims, layer)

    def forward(self, scores_BLE, forward_number, limit_groups) -> torch.Tensor:
        logits_BLE = uniform(self.stream.own_seed, forward_number, tuple(scores_BLE.shape))
        return limit_groups(logits_BLE).topk(self.top_k, dim=-1, sorted=False).indices
