"""Overload: tokens of the most loaded expert-parallel rank over those of a balanced one.

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
    name = "avg_overload_factor"
    description = (
        "Tokens on the most loaded expert-parallel rank over the balanced number, mean over "
        "micro-batches"
    )
    over_ranks = Reduction.MEAN

    def measure(self, step: RankStep) -> np.ndarray:
        return overload_factors(step.received_NMR).mean(axis=1)


class MaximumOverload(Metric):
    name = "max_overload_factor"
    description = "The same, of the worst micro-batch"
    over_ranks = Reduction.MAX
    over_layers = Reduction.MAX

    def measure(self, step: RankStep) -> np.ndarray:
        return overload_factors(step.received_NMR).max(axis=1)


class CumulativeOverload(Metric):
    name = "max_cum_overload_factor"
    description = (
        "Peak of the tokens that the worst rank keeps until backward, over the peak of a "
        "balanced rank"
    )
    over_ranks = Reduction.MAX
    over_layers = Reduction.MAX
    of_step = True

    def measure(self, step: RankStep) -> np.ndarray:
        factor = cumulative_overload_factor(
            step.actions,
            step.stages,
            step.received_NMR[..., step.ep_rank],
            step.received_NMR.mean(axis=-1),
        )
        return np.full(len(step.stages), factor)


def overload_factors(received: np.ndarray) -> np.ndarray:
    """Tokens of the most loaded rank over the mean of the ranks.

    Args:
        received: tokens of each rank ``(..., R)``.

    Returns:
        float64 ``(...)`` in [1, R]; 1 where nothing was routed.
    """
    balanced = received.mean(axis=-1)
    return np.where(balanced > 0, received.max(axis=-1) / np.where(balanced > 0, balanced, 1), 1.0)


def peak_tokens(actions: Sequence[Action], stages: Sequence[int], tokens_NM: np.ndarray) -> float:
    """Most tokens that one rank keeps for backward at once, in any pass of the step.

    Args:
        actions: actions of the rank's pipeline in one pass; see :func:`peak`. The micro-batches
            of a step are those of one pass after the other.
        stages: pipeline stage of each router.
        tokens_NM: tokens received for each router and micro-batch.
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
    """Peak of the kept tokens over the peak of a balanced rank in the same schedule.

    Activation memory until backward grows with it. Below 1 on a rank that gets less than its
    share; 1 where nothing was routed. Args: as :func:`peak_tokens`.
    """
    balanced = peak_tokens(actions, stages, balanced_NM)
    if balanced == 0:
        return 1.0
    return peak_tokens(actions, stages, tokens_NM) / balanced
