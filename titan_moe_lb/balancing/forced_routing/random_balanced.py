"""Balance on average: random experts for every token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from titan_moe_lb.balancing.forced_routing.functional import uniform
from titan_moe_lb.balancing.forced_routing.random_routing import RandomRouting


class RandomBalanced(RandomRouting):
    """Top-k of random logits, which are drawn for every token and forward.

    The load is balanced up to chance.
    """

    type_name: ClassVar[str] = "random_balanced"

    @dataclass(kw_only=True, slots=True)
    class Config(RandomRouting.Config):
        """Settings of ``random_balanced``."""

    def logits(self, shape: tuple[int, ...], forward_number: torch.Tensor) -> torch.Tensor:
        """Draw uniform logits."""
        return uniform(self.own_seed, forward_number, shape)
