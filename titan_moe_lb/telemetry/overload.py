"""How much more the most loaded rank gets than a balanced one. Pure functions on numpy arrays.

Shape suffixes: N = routers, M = micro-batches, E = experts, R = ranks of an EP group.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from titan_moe_lb.parallel.schedules import Action, peak


def tokens_per_rank(counts: np.ndarray, ep_degree: int) -> np.ndarray:
    """Routed tokens that each rank of an EP group receives.

    Args:
        counts: tokens per expert ``(..., E)`` over the tokens that the group dispatches
            together.
        ep_degree: R; rank r holds experts ``[r E/R, (r+1) E/R)``, as torchtitan places them.

    Returns:
        ``(..., R)``, in the dtype of the counts.
    """
    return counts.reshape(*counts.shape[:-1], ep_degree, -1).sum(axis=-1)


def overload_factors(
    tokens_per_rank: np.ndarray, balanced_tokens_per_rank: np.ndarray
) -> np.ndarray:
    """Tokens on the most loaded rank over the tokens of a balanced one.

    Args:
        tokens_per_rank: ``(..., R)``.
        balanced_tokens_per_rank: ``(...)``, the mean over the ranks.

    Returns:
        float64 ``(...)``, at least 1 and at most R; 1 where nothing was routed.
    """
    balanced = np.asarray(balanced_tokens_per_rank, dtype=np.float64)
    routed = balanced > 0
    return np.where(routed, tokens_per_rank.max(axis=-1) / np.where(routed, balanced, 1.0), 1.0)


def peak_tokens(actions: Sequence[Action], stages: Sequence[int], tokens_NM: np.ndarray) -> float:
    """Most tokens that one rank keeps at once, in any pass of the step.

    Args:
        actions: of the rank's pipeline in one pass; the micro-batches of a step are those of
            one pass after the other. Kept until when: see :func:`peak`.
        stages: pipeline stage of each router.
        tokens_NM: received for each router and micro-batch.
    """
    per_pass = 1 + max(micro_batch for _stage, _kind, micro_batch in actions)
    tokens_NAP = tokens_NM.reshape(len(stages), -1, per_pass)
    of_stage = {
        stage: tokens_NAP[np.flatnonzero(np.asarray(stages) == stage)].sum(axis=0)
        for stage in {stage for stage, _kind, _micro_batch in actions}
    }
    return float(np.max(peak(actions, lambda stage, m: of_stage[stage][:, m])))


def cumulative_overload_factor(
    actions: Sequence[Action],
    stages: Sequence[int],
    tokens_NM: np.ndarray,
    balanced_NM: np.ndarray,
) -> float:
    """The rank's peak of kept tokens over the peak of a balanced rank in the same schedule.

    Activation memory kept until backward grows with it. Below 1 on a rank that gets less
    than its share; 1 where nothing was routed. Args: as :func:`peak_tokens`.
    """
    balanced = peak_tokens(actions, stages, balanced_NM)
    if balanced == 0:
        return 1.0
    return peak_tokens(actions, stages, tokens_NM) / balanced
