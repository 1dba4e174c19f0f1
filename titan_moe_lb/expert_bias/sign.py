"""The sign rule: experts with too few tokens are favoured in the next step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from titan_moe_lb.errors import JobError
from titan_moe_lb.expert_bias.base import ExpertBias
from titan_moe_lb.value_schedule import check_changes, value_at


class SignBias(ExpertBias):
    """``b_i += speed * sign(mean_j n_j - n_i)``, less the mean over the experts.

    torchtitan 0.3.0's rule: the bias keeps its mean. Source of the sign update: arXiv
    2408.15664, Algorithm 1. Fixed point: every expert has the mean load; near it the bias
    goes on swinging by ``speed``.
    """

    type_name: ClassVar[str] = "sign"

    @dataclass(kw_only=True, slots=True)
    class Config(ExpertBias.Config):
        speed: float = 1e-3
        """u in arXiv 2408.15664, gamma in DeepSeek-V3. ``changes`` change it."""

        def __post_init__(self) -> None:
            if not (math.isfinite(self.speed) and self.speed > 0):
                raise JobError(
                    f"expert_bias speed is {self.speed}; it must be a finite number above 0 "
                    '(to keep the bias as it is take type = "frozen", for none expert_bias = "none")'
                )
            check_changes("expert_bias", self.changes)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.speed = config.speed

    def set_progress(self, step: int, tokens: int) -> None:
        self.speed = value_at(self.config.speed, self.config.changes, step, tokens)

    def delta(self, bias_NE: torch.Tensor, counts_NE: torch.Tensor) -> torch.Tensor:
        return bias_update(counts_NE, self.speed)


def bias_update(counts_E: torch.Tensor, speed: float) -> torch.Tensor:
    """The formula of :class:`SignBias`.

    Args:
        counts_E: tokens per expert of the whole step ``(..., E)``, any numeric dtype.
        speed: see :class:`SignBias.Config`.

    Returns:
        float32 ``(..., E)``.
    """
    counts_E = counts_E.float()
    delta_E = speed * torch.sign(counts_E.mean(dim=-1, keepdim=True) - counts_E)
    return delta_E - delta_E.mean(dim=-1, keepdim=True)
