"""Random imbalance: some experts are liked more than others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from titan_moe_lb.errors import JobError
from titan_moe_lb.forced_routing.base import ForcedRouting
from titan_moe_lb.forced_routing.functional import standard_normal
from titan_moe_lb.forced_routing.random_stream import RandomStream


class BiasedNormal(ForcedRouting):
    """Top-k of standard normal logits plus ``std`` times a normal bias of each expert.

    The bias is the same on every rank, so that the imbalance of the whole job does not
    average out. Source: Megatron-Core's ``moe_router_force_biased``, whose positive std
    is ``resample = "every_forward"`` and whose negative one is ``"once_per_layer"``.
    """

    type_name: ClassVar[str] = "biased_normal"

    @dataclass(kw_only=True, slots=True)
    class Config(ForcedRouting.Config):
        std: float
        """Standard deviation of the bias, in standard deviations of the logits; above 0."""

        resample: Literal["every_forward", "once_per_layer"] = "every_forward"
        """Draw the bias anew in every forward, or once for each layer."""

        seed: int = 0

        def __post_init__(self) -> None:
            if not math.isfinite(self.std) or self.std <= 0:
                raise JobError(
                    f"biased_normal std is {self.std}; it must be a finite number above 0 "
                    '(for balance on average use type = "random_balanced")'
                )

        def describe(self) -> str:
            return f"biased_normal (std {self.std:g}, {self.resample}, seed {self.seed})"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.std = config.std
        self.resample = config.resample
        self.stream = RandomStream.Config(seed=config.seed).build()

    def wire(self, parallel_dims, layer: int) -> None:
        self.stream.wire(parallel_dims, layer)

    def bias_E(self, forward_number: torch.Tensor) -> torch.Tensor:
        """The bias of each expert in a forward, float32 ``(E,)``, the same on every rank."""
        number = forward_number
        if self.resample == "once_per_layer":
            number = torch.zeros_like(forward_number)
        return self.std * standard_normal(self.stream.shared_seed, number, (self.num_experts,))

    def forward(self, scores_BLE, forward_number, limit_groups) -> torch.Tensor:
        shape = tuple(scores_BLE.shape)
        logits_BLE = standard_normal(self.stream.own_seed, forward_number, shape)
        logits_BLE = logits_BLE + self.bias_E(forward_number)
        return limit_groups(logits_BLE).topk(self.top_k, dim=-1, sorted=False).indices
