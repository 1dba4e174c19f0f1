"""Random imbalance: every expert has a random bias."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from titan_moe_lb.balancing.forced_routing.functional import standard_normal
from titan_moe_lb.balancing.forced_routing.random_routing import RandomRouting
from titan_moe_lb.errors import JobError


class BiasedNormal(RandomRouting):
    """Top-k of standard normal logits plus ``std`` times a normal bias of each expert.

    The bias is the same on every rank, so the imbalance does not average out over the job.
    Source: Megatron-Core's ``moe_router_force_biased``, whose positive std is
    ``resample = "every_forward"`` and whose negative std is ``"once_per_layer"``.
    """

    type_name: ClassVar[str] = "biased_normal"

    @dataclass(kw_only=True, slots=True)
    class Config(RandomRouting.Config):
        """Settings of ``biased_normal``."""

        std: float
        """Standard deviation of the bias, in standard deviations of the logits; above 0."""

        resample: Literal["every_forward", "once_per_layer"] = "every_forward"
        """Draw a new bias in every forward, or one for each layer."""

        def __post_init__(self) -> None:
            if not math.isfinite(self.std) or self.std <= 0:
                raise JobError(
                    f"biased_normal std is {self.std}; it must be a finite number above 0 "
                    '(for balance on average use type = "random_balanced")'
                )

    def bias_E(self, forward_number: torch.Tensor) -> torch.Tensor:
        """Draw the bias of each expert in a forward, float32 ``(E,)``, the same on every rank."""
        if self.config.resample == "once_per_layer":
            forward_number = torch.zeros_like(forward_number)
        bias_E = standard_normal(self.shared_seed, forward_number, (self.num_experts,))
        return self.config.std * bias_E

    def logits(self, shape: tuple[int, ...], forward_number: torch.Tensor) -> torch.Tensor:
        """Draw normal logits, and add the bias."""
        own_BLE = standard_normal(self.own_seed, forward_number, shape)
        return own_BLE + self.bias_E(forward_number)
