"""Load-balancing loss over one rank's batch."""

from __future__ import annotations

from typing import ClassVar

import torch

from titan_moe_lb.balancing.losses.base import SumsLoss


class BatchWiseAuxLoss(SumsLoss):
    """Mean over the ranks of sum_i f_i P_i over all T = B L tokens of the local batch.

    f_i = E / (K T) * #{t : i selected}, P_i = 1 / T * sum_t p(t,i). Source: Switch Transformer,
    arXiv 2101.03961, Eqs. 4 to 6; the "micro-batch LBL" of arXiv 2501.11873. The loss is not
    additive over sequences, so its value depends on the data-parallel degree by definition.
    """

    type_name: ClassVar[str] = "batch_wise"
    metric_name: ClassVar[str] = "load_balancing_loss"
    linear: ClassVar[bool] = True
    additive: ClassVar[bool] = False

    def coefficients(self, sums_BE, counts_BE, sequences) -> torch.Tensor:
        """Return f_i / T, times the share of the batch."""
        batch = sequences.together(counts_BE.shape[0])
        scale = self.num_experts / self.top_k
        return counts_BE.sum(dim=0, keepdim=True) * (scale * batch.share / batch.tokens**2)
