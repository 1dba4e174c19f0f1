"""Importance loss."""

from __future__ import annotations

from typing import ClassVar

import torch

from titan_moe_lb.balancing.losses.base import SumsLoss


class ImportanceLoss(SumsLoss):
    """Mean over the sequences of CV^2 of the experts' mean probabilities.

    CV is the coefficient of variation of P_i = 1 / L * sum_t p(t,i), whose mean over the experts is
    1 / E: CV^2 = 1 / E * sum_i (E P_i - 1)^2; 0 at balance. The loss balances the probabilities of
    the experts, not the numbers of their tokens. Source: arXiv 1701.06538, section 4. The paper's
    loss is over a batch; a loss over a sequence does not depend on how the batch is cut.
    """

    type_name: ClassVar[str] = "importance"
    metric_name: ClassVar[str] = "importance_loss"
    needs_counts: ClassVar[bool] = False

    def value(self, sums_BE, counts_BE, sequences) -> torch.Tensor:
        """Compute CV^2 of each sequence, times its share."""
        excess_BE = sums_BE * (self.num_experts / sequences.tokens) - 1
        return (excess_BE.square() * sequences.share).sum() / self.num_experts

    def coefficients(self, sums_BE, counts_BE, sequences) -> torch.Tensor:
        """Return 2 (E P_i - 1) / L, times the share of the sequence."""
        excess_BE = sums_BE * (self.num_experts / sequences.tokens) - 1
        return excess_BE * (2 * sequences.share / sequences.tokens)
