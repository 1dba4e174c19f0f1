"""Metrics of the size and movement of the expert bias."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from titan_moe_lb.balancing.router import LoadBalancedRouter
from titan_moe_lb.telemetry.metrics.base import Metric, Reduction
from titan_moe_lb.telemetry.rank_step import RankStep


class _OfBias(Metric):
    """Base class of the metrics of routers with an expert bias."""

    over_ranks = Reduction.MAX

    @classmethod
    def applies_to(cls, router: LoadBalancedRouter.Config) -> bool:
        """Return True for a router with an expert bias."""
        return router.expert_bias is not None


class BiasRange(_OfBias):
    """Largest less smallest expert bias."""

    name = "bias_range"

    def measure(self, step: RankStep) -> np.ndarray | None:
        """Compute the largest less the smallest bias."""
        return _of_each_row(step.bias_NE, np.ptp)


class BiasNorm(_OfBias):
    """Euclidean norm of the expert biases."""

    name = "bias_norm"

    def measure(self, step: RankStep) -> np.ndarray | None:
        """Compute the norm."""
        return _of_each_row(step.bias_NE, np.linalg.norm)


class BiasLargestStep(_OfBias):
    """Largest change of an expert's bias in the step."""

    name = "bias_largest_step"
    over_layers = Reduction.MAX

    def measure(self, step: RankStep) -> np.ndarray | None:
        """Compute the largest absolute change."""
        return _of_each_row(step.bias_delta_NE, lambda delta_E: np.abs(delta_E).max())


def _of_each_row(
    table_NE: np.ndarray | None, function: Callable[[np.ndarray], Any]
) -> np.ndarray | None:
    """Apply a function to each row without its NaNs; NaN for a row of NaNs."""
    if table_NE is None:
        return None
    rows = [row_E[~np.isnan(row_E)] for row_E in table_NE]
    return np.array([function(row) if row.size else np.nan for row in rows])
