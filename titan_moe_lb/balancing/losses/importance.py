"""The importance loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from titan_moe_lb.balancing.losses.base import SumsLoss


class ImportanceLoss(SumsLoss):
    """CV^2 over the experts of a sequence's mean probabilities, mean over the sequences.

    Squared coefficient of variation of P_i = 1 / L * sum_t p(t,i), whose mean over the
    experts is 1 / E: 1 / E * sum_i (E P_i - 1)^2; 0 at balance. It levels what the
    experts are given to say, not how many tokens they get. Source: arXiv 1701.06538,
    section 4, there over a batch; over a sequence here, so that it does not depend on how
    the batch is cut.
    """

    type_name: ClassVar[str] = "importance"
    metric_name: ClassVar[str] = "importance_loss"
    needs_counts: ClassVar[bool] = False

    @dataclass(kw_only=True, slots=True)
    class Config(SumsLoss.Config):
        pass

    def value(self, sums_BE, counts_BE, sequences) -> torch.Tensor:
        excess_BE = sums_BE * (self.num_experts / sequences.tokens) - 1
        return (excess_BE.square() * sequences.share).sum() / self.num_experts

    def coefficients(self, sums_BE, counts_BE, sequences) -> torch.Tensor:
        """2 (E P_i - 1) / L, times the share of the sequence."""
        excess_BE = sums_BE * (self.num_experts / sequences.tokens) - 1
        return excess_BE * (2 * sequences.share / sequences.tokens)
