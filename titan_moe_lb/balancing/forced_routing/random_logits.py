"""Strategies that draw random logits: balance on average, or random imbalance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from titan_moe_lb.balancing.forced_routing.base import ForcedRouting
from titan_moe_lb.balancing.forced_routing.functional import hash_seed, standard_normal, uniform
from titan_moe_lb.errors import JobError


class RandomRouting(ForcedRouting):
    """Top-k of random logits, under the group limit of the model.

    Attributes:
        own_seed: seed for the tokens of this rank in this layer, int64 ``()``. Ranks that see the
            same tokens (TP without EP) have the same seed.
        shared_seed: seed of this layer on all ranks, int64 ``()``.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ForcedRouting.Config):
        seed: int = 0
        """Seed of the random logits."""

        def tensors(self) -> dict[str, torch.Tensor]:
            """Return zeros for the seeds, which ``wire`` fills."""
            names = ("own_seed", "shared_seed")
            return {name: torch.zeros((), dtype=torch.int64) for name in names}

    own_seed: torch.Tensor
    shared_seed: torch.Tensor

    def wire(self, groups, layer: int) -> None:
        """Set the seeds of the rank and the layer."""
        self.shared_seed.fill_(hash_seed(self.config.seed, layer))
        self.own_seed.fill_(hash_seed(self.config.seed, layer, groups.token_ranks.rank + 1))

    def logits(self, shape: tuple[int, ...], forward_number: torch.Tensor) -> torch.Tensor:
        """Draw random logits of the local tokens."""
        raise NotImplementedError

    def forward(self, scores_BLE, forward_number, limit_groups) -> torch.Tensor:
        """Select the top-k of random logits."""
        logits_BLE = self.logits(tuple(scores_BLE.shape), forward_number)
        return limit_groups(logits_BLE).topk(self.top_k, dim=-1, sorted=False).indices


class RandomBalanced(RandomRouting):
    """Top-k of random logits, which are drawn for every token and forward.

    The load is balanced up to chance.
    """

    type_name: ClassVar[str] = "random_balanced"

    def logits(self, shape: tuple[int, ...], forward_number: torch.Tensor) -> torch.Tensor:
        """Draw uniform logits."""
        return uniform(self.own_seed, forward_number, shape)


class BiasedNormal(RandomRouting):
    """Top-k of standard normal logits plus ``std`` times a normal bias of each expert.

    The bias is the same on every rank, so the imbalance does not average out over the job.
    Source: Megatron-Core's ``moe_router_force_biased``, whose positive std is
    ``resample = "every_forward"`` and whose negative std is ``"once_per_layer"``.
    """

    type_name: ClassVar[str] = "biased_normal"

    @dataclass(kw_only=True, slots=True)
    class Config(RandomRouting.Config):
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
