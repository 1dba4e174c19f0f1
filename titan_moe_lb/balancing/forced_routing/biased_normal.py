"""Random imbalance: some experts are liked more than others."""

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

    The bias is the same on every rank, so that the imbalance of the whole job does not
    average out. Source: Megatron-Core's ``moe_router_force_biased``, whose positive std
    is ``resample = "every_forward"`` and whose negative one is ``"once_per_layer"``.
    """

    type_name: ClassVar[str] = "biased_normal"

    @dataclass(kw_only=True, slots=True)
    class Config(RandomRouting.Config):
        std: float
        """Standard deviation of the bias, in standard deviations of the logits; above 0."""

        resample: Literal["every_forward", "once_per_layer"] = "every_forward"
        """Draw the bias anew in every forward, or once for each layer."""

        def __post_init__(self) -> None:
            if not math.isfinite(self.std) or self.std <= 0:
                raise JobError(
                    f"biased_normal std is {self.std}; it must be a finite number above 0 "
                    '(for balance on average use type = "random_balanced")'
                )

    def bias_E(self, forward_number: torch.Tensor) -> torch.Tensor:
        """The bias of each expert in a forward, float32 ``(E,)``, the same on every rank."""
        if self.config.resample == "once_per_layer":
            forward_number = torch.zeros_like(forward_number)
        bias_E = standard_normal(self.shared_seed, forward_number, (self.num_experts,))
        return self.config.std * bias_E

    def logits(self, shape: tuple[int, ...], forward_number: torch.Tensor) -> torch.Tensor:
        own_BLE = standard_normal(self.own_seed, forward_number, shape)
        return own_BLE + self.bias_E(forward_number)
