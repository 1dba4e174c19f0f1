"""The load-balancing loss over one rank's batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from titan_moe_lb.losses.base import LoadBalanceLoss
from titan_moe_lb.losses.functional import expert_load


class BatchWiseAuxLoss(LoadBalanceLoss):
    """f and P over all tokens of the rank's local batch.

    Source: Switch Transformer, arXiv 2101.03961, Eqs. 4 to 6; the "micro-batch LBL"
    of arXiv 2501.11873. Not additive over micro-batches, so it is refused with
    pipeline parallelism and gradient accumulation, and its value depends on the
    data-parallel degree by definition. See
    :func:`titan_moe_lb.losses.functional.batch_wise_load_balance`.
    """

    type_name: ClassVar[str] = "batch_wise"
    metric_name: ClassVar[str] = "load_balancing_loss"

    @dataclass(kw_only=True, slots=True)
    class Config(LoadBalanceLoss.Config):
        pass

    def load(self, counts_BE: torch.Tensor, top_k: int, sequence_length: int) -> torch.Tensor:
        num_tokens = counts_BE.shape[0] * sequence_length
        return expert_load(counts_BE.sum(dim=0, keepdim=True), top_k, num_tokens)
