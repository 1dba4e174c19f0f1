"""How much more the most loaded rank gets than a balanced one. Pure functions on numpy arrays.

Shape suffixes: N = routers, M = micro-batches, E = experts, R = ranks of an EP group.
"""

from __future__ import annotations

import numpy as np


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


def peak_tokens(forward_times: np.ndarray, backward_times: np.ndarray, tokens: np.ndarray) -> float:
    """Most tokens that one rank holds at once, each from its forward to its backward.

    Args:
        forward_times, backward_times: int ``(N, M)``, when each micro-batch passed each
            router of the rank; 0 where it did not.
        tokens: ``(N, M)`` that the rank received for it.
    """
    passed, released = forward_times > 0, backward_times > 0
    times = np.concatenate([forward_times[passed], backward_times[released]])
    changes = np.concatenate([tokens[passed], -tokens[released]])
    if times.size == 0:
        return 0.0
    return float(np.cumsum(changes[np.argsort(times)]).max())


def cumulative_overload_factor(
    forward_times: np.ndarray,
    backward_times: np.ndarray,
    tokens: np.ndarray,
    balanced_tokens: np.ndarray,
) -> float:
    """The rank's peak of held tokens over the peak of a balanced rank in the same schedule.

    Activation memory kept until backward grows with it. Below 1 on a rank that gets less
    than its share; 1 where nothing was routed. Args: as :func:`peak_tokens`.
    """
    balanced = peak_tokens(forward_times, backward_times, balanced_tokens)
    if balanced == 0:
        return 1.0
    return peak_tokens(forward_times, backward_times, tokens) / balanced
