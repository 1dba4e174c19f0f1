"""The router z-loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from titan_moe_lb.losses.base import AuxLoss


class RouterZLoss(AuxLoss):
    """mean_t logsumexp_i(logits(t,i))**2: keeps the gate's logits small.

    Source: ST-MoE, arXiv 2202.08906, Eq. 5. See
    :func:`titan_moe_lb.losses.functional.router_z_loss`. Reaches the router through
    :func:`titan_moe_lb.losses.injection.scores_with_z_loss`.
    """

    type_name: ClassVar[str] = "z_loss"
    metric_name: ClassVar[str] = "z_loss"

    @dataclass(kw_only=True, slots=True)
    class Config(AuxLoss.Config):
        pass

    def coefficient(self, sequence_length: int) -> float:
        """Factor of one token's logsumexp**2 in the unweighted loss."""
        return 1.0 / (sequence_length * self.global_batch_size)
