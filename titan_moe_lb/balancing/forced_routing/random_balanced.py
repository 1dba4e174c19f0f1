"""Balance on average: every token draws its experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from titan_moe_lb.balancing.forced_routing.functional import uniform
from titan_moe_lb.balancing.forced_routing.random_routing import RandomRouting


class RandomBalanced(RandomRouting):
    """Top-k of random logits, new ones for every token and forward, others on every rank.

    The load is balanced up to chance.
    """

    type_name: ClassVar[str] = "random_balanced"

    @dataclass(kw_only=True, slots=True)
    class Config(RandomRouting.Config):
        pass

    def logits(self, shape: tuple[int, ...], forward_number: torch.Tensor) -> torch.Tensor:
        return uniform(self.own_seed, forward_number, shape)
