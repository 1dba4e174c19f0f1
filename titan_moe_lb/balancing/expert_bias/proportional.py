"""The proportional rule: the further from balance, the larger the step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from titan_moe_lb.balancing.expert_bias.base import BiasStep
from titan_moe_lb.balancing.expert_bias.speed import SpeedBias


class ProportionalBias(SpeedBias):
    """``b_i += speed * (1 / E - n_i / sum_j n_j)``: the bias keeps its mean.

    Source: LongCat-Flash, arXiv 2509.01322, section 2.1.1, without its zero-computation
    experts. The report gives no value of mu, so that there is no default; mu = E u moves
    an expert without any token as fast as the sign rule does at speed u. Fixed point:
    every expert has the mean load, and there the bias rests.
    """

    type_name: ClassVar[str] = "proportional"

    @dataclass(kw_only=True, slots=True)
    class Config(SpeedBias.Config):
        pass

    def delta(self, step: BiasStep) -> torch.Tensor:
        share_NE = step.counts_NE / step.choices_N1
        return self.speed * (1 / step.counts_NE.shape[-1] - share_NE)
