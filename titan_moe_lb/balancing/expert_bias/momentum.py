"""Bias rule with soft-clamped updates and momentum (SMEBU)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from titan_moe_lb.balancing.expert_bias.base import BiasStep, SpeedBias
from titan_moe_lb.errors import JobError


class MomentumBias(SpeedBias):
    """``b_i += m_i``: soft-clamped updates with momentum.

    ``m_i = momentum * m_i + (1 - momentum) * d_i``, where ``d_i`` is
    ``speed * tanh(scale * (1 - n_i / mean_j n_j))`` less its mean over the experts.

    Source: SMEBU of Trinity Large, arXiv 2602.17004. ``speed``, ``scale`` and ``momentum`` are its
    lambda, kappa and beta; the defaults are its values. Formula and defaults were compared with
    published notes on the report, not with the report itself. At the fixed point every expert has
    the mean load and ``m`` is 0; unlike with the sign rule, the bias rests there.
    """

    type_name: ClassVar[str] = "momentum"
    state_names: ClassVar[tuple[str, ...]] = ("momentum_E",)

    @dataclass(kw_only=True, slots=True)
    class Config(SpeedBias.Config):
        speed: float = 5e-4
        """Largest update, before its mean is subtracted; ``changes`` can change it."""

        scale: float = 2.0
        """Steepness of the clamp; a larger scale clamps smaller violations."""

        momentum: float = 0.5
        """Share of the last update in the new one, in [0, 1)."""

        def __post_init__(self) -> None:
            SpeedBias.Config.__post_init__(self)
            if not (math.isfinite(self.scale) and self.scale > 0):
                raise JobError(
                    f"expert_bias momentum has scale {self.scale}; it must be a finite number above 0"
                )
            if not 0 <= self.momentum < 1:
                raise JobError(
                    f"expert_bias momentum has momentum {self.momentum}; it must be in [0, 1)"
                )

    def delta(self, step: BiasStep) -> torch.Tensor:
        """Update the momentum, and return it."""
        mean_N1 = step.choices_N1 / step.counts_NE.shape[-1]
        violation_NE = 1 - step.counts_NE / mean_N1
        delta_NE = self.speed * torch.tanh(self.config.scale * violation_NE)
        delta_NE -= delta_NE.mean(dim=-1, keepdim=True)
        return step.state["momentum_E"].lerp_(delta_NE, 1 - self.config.momentum)
