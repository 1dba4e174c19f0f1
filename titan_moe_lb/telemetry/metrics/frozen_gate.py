"""Metric of the weights of frozen gates."""

from __future__ import annotations

import numpy as np

from titan_moe_lb.balancing.router import LoadBalancedRouter
from titan_moe_lb.telemetry.metrics.base import Metric, Reduction
from titan_moe_lb.telemetry.rank_step import RankStep


class FrozenGate(Metric):
    """Squared norm of the weights of a frozen gate; it changes only if the gate does."""

    name = "frozen_gate_squared"
    over_ranks = Reduction.MEAN

    @classmethod
    def applies_to(cls, router: LoadBalancedRouter.Config) -> bool:
        """Return True for a router with a frozen gate."""
        return "gate" in router.frozen

    def measure(self, step: RankStep) -> np.ndarray | None:
        """Read the squared norm of this rank's part."""
        return step.frozen_gate_squares_N
