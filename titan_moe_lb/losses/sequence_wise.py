"""The sequence-wise balance loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from titan_moe_lb.losses.base import SumsLoss


class SequenceWiseAuxLoss(SumsLoss):
    """sum_i f_i P_i of each sequence, mean over the sequences.

    Over the L tokens of one sequence, f_i = E / (K L) * #{t : i selected} and
    P_i = 1 / L * sum_t p(t,i); 1.0 at perfect balance. Source: DeepSeek-V3, arXiv
    2412.19437, Eqs. 17 to 20.
    """

    type_name: ClassVar[str] = "sequence_wise"
    metric_name: ClassVar[str] = "seq_load_balancing_loss"
    linear: ClassVar[bool] = True

    @dataclass(kw_only=True, slots=True)
    class Config(SumsLoss.Config):
        pass

    def value(self, sums_BE, counts_BE, sequence_length) -> torch.Tensor:
        f_BE = counts_BE * (self.num_experts / (self.top_k * sequence_length))
        P_BE = sums_BE / sequence_length
        return (f_BE * P_BE).sum() / self.global_batch_size

    def coefficients(self, sums_BE, counts_BE, sequence_length) -> torch.Tensor:
        """f_i / (L G)."""
        scale = self.top_k * sequence_length**2 * self.global_batch_size
        return counts_BE * (self.num_experts / scale)
