"""Bias rule whose update is proportional to the imbalance."""

from __future__ import annotations

from typing import ClassVar

import torch

from titan_moe_lb.balancing.expert_bias.base import BiasStep, SpeedBias


class ProportionalBias(SpeedBias):
    """``b_i += speed * (1 / E - n_i / sum_j n_j)``: the bias keeps its mean.

    Source: LongCat-Flash, arXiv 2509.01322, section 2.1.1, without its zero-computation experts.
    The report gives no value of mu, so the speed has no default. mu = E u moves an expert without
    tokens as fast as the sign rule at speed u. At the fixed point every expert has the mean load,
    and the bias rests there.
    """

    type_name: ClassVar[str] = "proportional"

    def delta(self, step: BiasStep) -> torch.Tensor:
        """Compute the update from the experts' shares of all choices."""
        share_NE = step.counts_NE / step.choices_N1
        return self.speed * (1 / step.counts_NE.shape[-1] - share_NE)
