"""Metrics of the gradients with respect to a router's logits."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from titan_moe_lb.balancing.router import LoadBalancedRouter
from titan_moe_lb.telemetry.metrics.base import Metric, Reduction
from titan_moe_lb.telemetry.rank_step import RankStep


class _OfGradient(Metric):
    """Base class of both squared gradient norms."""

    over_ranks = Reduction.SUM
    index: ClassVar[int]
    """Index in the last axis of ``RankStep.gradient_squares_N2``."""

    @classmethod
    def applies_to(cls, router: LoadBalancedRouter.Config) -> bool:
        """Return True if the job measures router gradients."""
        return router.loop.gradients_every > 0

    def measure(self, step: RankStep) -> np.ndarray | None:
        """Read the squared norm over the tokens of this rank."""
        squares_N2 = step.gradient_squares_N2
        return None if squares_N2 is None else squares_N2[:, self.index].astype(np.float64)


class MainGradient(_OfGradient):
    """Squared norm of the gradient of the model's loss in the logits of the router."""

    name = "main_gradient_squared"
    index = 0


class AuxGradient(_OfGradient):
    """Squared norm of the gradient of the aux losses in the logits of the router."""

    name = "aux_gradient_squared"
    index = 1
