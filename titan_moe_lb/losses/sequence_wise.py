"""The sequence-wise balance loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from titan_moe_lb.losses.base import LoadBalanceLoss
from titan_moe_lb.losses.functional import expert_load


class SequenceWiseAuxLoss(LoadBalanceLoss):
    """f and P over one sequence, mean over the sequences.

    Source: DeepSeek-V3, arXiv 2412.19437, Eqs. 17 to 20. See
    :func:`titan_moe_lb.losses.functional.sequence_wise_load_balance`.
    """

    type_name: ClassVar[str] = "sequence_wise"
    metric_name: ClassVar[str] = "seq_load_balancing_loss"

    @dataclass(kw_only=True, slots=True)
    class Config(LoadBalanceLoss.Config):
        pass

    def load(self, counts_BE: torch.Tensor, top_k: int, sequence_length: int) -> torch.Tensor:
        return expert_load(counts_BE, top_k, sequence_length)
