"""Metrics of overload: tokens of the most loaded expert-parallel rank over the mean of its group.

Shape suffixes: N = routers, M = micro-batches, R = ranks of an EP group, A = passes of
gradient accumulation, P = micro-batches of one pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from titan_moe_lb.parallel.schedules import Action, peak
from titan_moe_lb.telemetry.metrics.base import Metric, Reduction
from titan_moe_lb.telemetry.rank_step import RankStep


class AverageOverload(Metric):
    """Mean overload factor of the micro-batches of a step."""

    name = "avg_overload_factor"
    description = (
        "Tokens on the most loaded expert-parallel rank over the balanced number, mean over "
        "micro-batches"
    )
    over_ranks = Reduction.MEAN

    def measure(self, step: RankStep) -> np.ndarray:
        """Compute the factor of each micro-batch, then the mean."""
        return overload_factors(step.received_NMR).mean(axis=1)


class MaximumOverload(Metric):
    """Overload factor of the worst micro-batch."""

    name = "max_overload_factor"
    over_ranks = Reduction.MAX
    over_layers = Reduction.MAX

    def measure(self, step: RankStep) -> np.ndarray:
        """Compute the factor of each micro-batch, then the maximum."""
        return overload_factors(step.received_NMR).max(axis=1)


class CumulativeOverload(Metric):
    """Peak of the tokens that a rank keeps for backward, over the peak of a balanced rank."""

    name = "max_cum_overload_factor"
    description = (
        "Peak of the tokens that the worst rank keeps until backward, over the peak of a "
        "balanced rank"
    )
    over_ranks = Reduction.MAX
    over_layers = Reduction.MAX
    of_step = True

    def measure(self, step: RankStep) -> np.ndarray:
        """Compute the factor over all layers of this rank, and repeat it for each layer."""
        factor = cumulative_overload_factor(
            step.actions,
            step.stages,
            step.received_NMR[..., step.ep_rank],
            step.received_NMR.mean(axis=-1),
        )
        return np.full(len(step.stages), factor)


def overload_factors(received: np.ndarray) -> np.ndarray:
    """Compute the tokens of the most loaded rank over the mean of the ranks.

    Returns:
        float64 ``(...)`` in [1, R]; 1 if nothing was routed.
    """
    balanced = received.mean(axis=-1)
    return np.where(balanced > 0, received.max(axis=-1) / np.where(balanced > 0, balanced, 1), 1.0)


def peak_tokens(actions: Sequence[Action], stages: Sequence[int], tokens_NM: np.ndarray) -> float:
    """Compute the peak number of tokens that one rank keeps for backward, over all passes.

    ``tokens_NM`` are those of each micro-batch of the step, pass after pass.
    """
    per_pass = 1 + max(micro_batch for _stage, _kind, micro_batch in actions)
    tokens_NAP = tokens_NM.reshape(len(stages), -1, per_pass)
    of_stage = {
        stage: tokens_NAP[np.equal(stages, stage)].sum(axis=0) for stage, *_action in actions
    }
    return float(np.max(peak(actions, lambda stage, m: of_stage[stage][:, m])))


def cumulative_overload_factor(
    actions: Sequence[Action],
    stages: Sequence[int],
    tokens_NM: np.ndarray,
    balanced_NM: np.ndarray,
) -> float:
    """Compute the peak of kept tokens over the peak of a balanced rank in the same schedule.

    Activation memory grows with this factor. It is below 1 on a rank that receives less than its
    share, and 1 if nothing was routed.
    """
    balanced = peak_tokens(actions, stages, balanced_NM)
    if balanced == 0:
        return 1.0
    return peak_tokens(actions, stages, tokens_NM) / balanced
