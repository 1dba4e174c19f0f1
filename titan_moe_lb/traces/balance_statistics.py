"""Statistics of tokens-per-expert counts: pure functions on numpy arrays.

The statistics reduce the last dimension of ``counts (..., E)``, of any numeric dtype. E is the
number of experts and K = top_k. A row of zeros counts as balanced.

A layer may have fewer experts than another layer of its model. Its row is padded with
:data:`ABSENT`, which the statistics skip.
"""

from __future__ import annotations

import numpy as np

ABSENT = -1
"""Count of an expert that the layer does not have; in a sum over steps, any number below 0."""


def max_violation(counts: np.ndarray) -> np.ndarray:
    """Compute MaxVio, ``max_i n_i / mean_i n_i - 1``: the relative excess of the fullest expert.

    It is 0 at balance, and E/K - 1 if all tokens choose the same K experts.
    Source: arXiv 2408.15664, Eq. 4.
    """
    return _relative(counts.max(axis=-1), counts) - 1.0


def coefficient_of_variation(counts: np.ndarray) -> np.ndarray:
    """Compute the population standard deviation of the counts over their mean.

    It is 0 at balance, and sqrt(E/K - 1) if all tokens choose the same K experts.
    Source: arXiv 1701.06538, section 4, whose importance and load terms are its square.
    """
    mean = _mean(counts)
    return counts.std(axis=-1, where=counts >= 0) / np.where(mean > 0, mean, 1.0)


def normalized_entropy(counts: np.ndarray) -> np.ndarray:
    """Compute ``-sum p ln p / ln E``, the entropy of the shares p_i = n_i / sum n over its maximum.

    It is 1 at balance, and ln K / ln E if all tokens choose the same K experts. A single expert
    is balanced.
    """
    num_experts = num_existing(counts)
    mean = _mean(counts)
    total = (mean * num_experts)[..., None]
    shares = counts / np.where(total > 0, total, 1.0)
    entropy = -(shares * np.log(np.where(shares > 0, shares, 1.0))).sum(axis=-1)
    several = (mean > 0) & (num_experts > 1)
    return np.where(several, entropy / np.log(np.maximum(num_experts, 2)), 1.0)


def num_dead_experts(counts: np.ndarray) -> np.ndarray:
    """Count the experts without a token, int64 in [0, E]; E if nothing was routed."""
    return (counts == 0).sum(axis=-1)


def relative_load(counts: np.ndarray) -> np.ndarray:
    """Divide the count of each expert by the balanced count.

    Returns:
        float64 ``(..., E)``: 1 at balance, at most E/K; NaN for an absent expert.
    """
    return np.where(counts >= 0, _relative(counts, counts, keepdims=True), np.nan)


def extreme_experts(
    values_ME: np.ndarray, number: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Find the experts with the largest and with the smallest values.

    Args:
        values_ME: value of each expert, NaN for an absent one.
        number: length of each list; shorter if there are fewer values.

    Returns:
        Row and expert of the largest values, descending, and of the smallest, ascending.
    """
    # argsort moves NaNs to the end.
    order = np.argsort(values_ME, axis=None, kind="stable")[: np.isfinite(values_ME).sum()]
    places = [divmod(index, values_ME.shape[1]) for index in order.tolist()]
    return places[::-1][:number], places[:number]


def _relative(values: np.ndarray, counts: np.ndarray, keepdims: bool = False) -> np.ndarray:
    mean = _mean(counts)[..., None] if keepdims else _mean(counts)
    return np.where(mean > 0, values / np.where(mean > 0, mean, 1.0), 1.0)


def mark_absent(counts: np.ndarray, num_experts_N: np.ndarray) -> np.ndarray:
    """Replace the counts of absent experts by :data:`ABSENT`.

    Args:
        counts: counts ``(N, ..., E)`` of N layers.
        num_experts_N: number of experts of each layer.
    """
    absent_NE = np.arange(counts.shape[-1]) >= num_experts_N[:, None]
    absent = absent_NE.reshape(len(counts), *[1] * (counts.ndim - 2), -1)
    return np.where(absent, ABSENT, counts)


def num_existing(counts: np.ndarray) -> np.ndarray:
    """Count the experts that each layer has, int64 ``(...)``."""
    return counts.shape[-1] - np.count_nonzero(counts < 0, axis=-1)


def _mean(counts: np.ndarray) -> np.ndarray:
    return counts.clip(min=0).sum(axis=-1, dtype=np.float64) / num_existing(counts)
