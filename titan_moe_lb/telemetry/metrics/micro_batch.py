"""Metric of the MaxVio of single micro-batches."""

from __future__ import annotations

import numpy as np

from titan_moe_lb.telemetry.metrics.base import Metric, Reduction
from titan_moe_lb.telemetry.rank_step import RankStep
from titan_moe_lb.traces.balance_statistics import max_violation


class MicroBatchMaxViolation(Metric):
    """MaxVio of a micro-batch by itself, mean over micro-batches."""

    name = "micro_batch_max_violation"
    over_ranks = Reduction.MEAN

    def measure(self, step: RankStep) -> np.ndarray:
        """Compute MaxVio of each micro-batch over the EP group, then the mean."""
        return max_violation(step.counts_NME).mean(axis=1)
