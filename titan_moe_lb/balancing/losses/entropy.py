"""Entropy of the mean router distribution."""

from __future__ import annotations

import math
from typing import ClassVar

import torch

from titan_moe_lb.balancing.losses.base import SumsLoss


class EntropyLoss(SumsLoss):
    """Mean over the sequences of log E - H(P): 0 at balance, at most log E.

    H(P) = - sum_i P_i log P_i in nats, P_i = 1 / L * sum_t p(t,i). Source: the global entropy loss
    of LIMoE, arXiv 2206.02770. The paper computes - H(P) over a batch and for each modality, up to
    a threshold; here it is over a sequence. Unlike the local entropy of the paper, this loss does
    not push single tokens to confident choices.
    """

    type_name: ClassVar[str] = "entropy"
    metric_name: ClassVar[str] = "entropy_loss"
    needs_counts: ClassVar[bool] = False

    def value(self, sums_BE, counts_BE, sequences) -> torch.Tensor:
        """Compute log E - H(P) of each sequence, times its share."""
        P_BE = sums_BE / sequences.tokens
        terms_BE = torch.xlogy(P_BE, P_BE) + math.log(self.num_experts) / self.num_experts
        return (terms_BE * sequences.share).sum()

    def coefficients(self, sums_BE, counts_BE, sequences) -> torch.Tensor:
        """Return (log P_i + 1) / L, times the share of the sequence."""
        # An expert whose share is 0 in float32 would get an infinite gradient.
        P_BE = (sums_BE / sequences.tokens).clamp_min(torch.finfo(torch.float32).tiny)
        return (P_BE.log() + 1) * (sequences.share / sequences.tokens)
