"""Size and movement of the expert bias."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from titan_moe_lb.balancing.router import LoadBalancedRouter
from titan_moe_lb.telemetry.metrics.base import Metric, Reduction
from titan_moe_lb.telemetry.rank_step import RankStep


class _OfBias(Metric):
    over_ranks = Reduction.MAX

    @classmethod
    def applies_to(cls, router: LoadBalancedRouter.Config) -> bool:
        return router.expert_bias is not None


class BiasRange(_OfBias):
    name = "bias_range"
    description = "Largest less smallest expert bias"

    def measure(self, step: RankStep) -> np.ndarray | None:
        return _of_each_row(step.bias_NE, np.ptp)


class BiasNorm(_OfBias):
    name = "bias_norm"
    description = "Euclidean norm of the expert biases"

    def measure(self, step: RankStep) -> np.ndarray | None:
        return _of_each_row(step.bias_NE, np.linalg.norm)


class BiasLargestStep(_OfBias):
    name = "bias_largest_step"
    description = "Largest change of an expert's bias in the step"
    over_layers = Reduction.MAX

    def measure(self, step: RankStep) -> np.ndarray | None:
        return _of_each_row(step.bias_delta_NE, lambda delta_E: np.abs(delta_E).max())


def _of_each_row(
    table_NE: np.ndarray | None, function: Callable[[np.ndarray], Any]
) -> np.ndarray | None:
    """A number of each row without its NaNs; NaN for a row of NaNs alone."""
    if table_NE is None:
        return None
    rows = [row_E[~np.isnan(row_E)] for row_E in table_NE]
    return np.array([function(row) if row.size else np.nan for row in rows])
