"""The load-balancing loss over one rank's batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from titan_moe_lb.losses.base import SumsLoss


class BatchWiseAuxLoss(SumsLoss):
    """sum_i f_i P_i over all T = B L tokens of the rank's local batch.

    f_i = E / (K T) * #{t : i selected}, P_i = 1 / T * sum_t p(t,i); mean over the ranks.
    Source: Switch Transformer, arXiv 2101.03961, Eqs. 4 to 6; the "micro-batch LBL" of
    arXiv 2501.11873. Not additive over sequences, so its value depends on the
    data-parallel degree by definition.
    """

    type_name: ClassVar[str] = "batch_wise"
    metric_name: ClassVar[str] = "load_balancing_loss"
    linear: ClassVar[bool] = True
    additive: ClassVar[bool] = False

    @dataclass(kw_only=True, slots=True)
    class Config(SumsLoss.Config):
        pass

    def value(self, sums_BE, counts_BE, sequence_length) -> torch.Tensor:
        num_sequences = counts_BE.shape[0]
        num_tokens = num_sequences * sequence_length
        f_E = counts_BE.sum(dim=0) * (self.num_experts / (self.top_k * num_tokens))
        P_E = sums_BE.sum(dim=0) / num_tokens
        return (f_E * P_E).sum() * (num_sequences / self.global_batch_size)

    def coefficients(self, sums_BE, counts_BE, sequence_length) -> torch.Tensor:
        """f_i / (L G)."""
        num_tokens = counts_BE.shape[0] * sequence_length
        scale = self.top_k * num_tokens * sequence_length * self.global_batch_size
        return counts_BE.sum(dim=0, keepdim=True) * (self.num_experts / scale)
