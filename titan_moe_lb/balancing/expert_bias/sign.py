"""Sign rule: it raises the bias of experts with too few tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from titan_moe_lb.balancing.expert_bias.base import BiasStep, SpeedBias


class SignBias(SpeedBias):
    """``b_i += speed * sign(mean_j n_j - n_i)``, less the mean over the experts.

    This is the rule of torchtitan 0.3.0; the bias keeps its mean. Source of the sign update: arXiv
    2408.15664, Algorithm 1. At the fixed point every expert has the mean load; near it the bias
    oscillates by ``speed``.
    """

    type_name: ClassVar[str] = "sign"

    @dataclass(kw_only=True, slots=True)
    class Config(SpeedBias.Config):
        speed: float = 1e-3
        """Size of every update: u in arXiv 2408.15664, gamma in DeepSeek-V3; ``changes`` can change
        it."""

    def delta(self, step: BiasStep) -> torch.Tensor:
        """Compute the sign of each expert's deviation from the mean load, times the speed."""
        num_experts = step.counts_NE.shape[-1]
        # Computed in integers: float32 would round counts beyond 2**24 and change the sign.
        delta_NE = self.speed * torch.sign(step.choices_N1 - num_experts * step.counts_NE)
        return delta_NE - delta_NE.mean(dim=-1, keepdim=True)
