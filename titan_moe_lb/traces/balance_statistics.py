"""Statistics of tokens-per-expert counts. Pure functions on numpy arrays.

Every function takes ``counts (..., E)`` of any numeric dtype and reduces the last
dimension. E is the number of experts and K = top_k. Where nothing was routed the
load counts as balanced. A layer with fewer experts than another one of its model has ``ABSENT``
in place of the others, which no function counts.
"""

from __future__ import annotations

import numpy as np

ABSENT = -1
"""In a table of counts: the layer has no such expert. In a sum over steps any number below 0 is."""


def max_violation(counts: np.ndarray) -> np.ndarray:
    """MaxVio, ``max_i n_i / mean_i n_i - 1``: how far the fullest expert is above the mean.

    Relative, without unit; 0 at balance, E/K - 1 when all tokens go to the same K experts.
    Source: arXiv 2408.15664, Eq. 4.
    """
    return _relative(counts.max(axis=-1), counts) - 1.0


def coefficient_of_variation(counts: np.ndarray) -> np.ndarray:
    """Population standard deviation of the counts over their mean.

    Without unit; 0 at balance, sqrt(E/K - 1) when all tokens go to the same K experts.
    Source: the importance and load terms of arXiv 1701.06538, section 4, are its square.
    """
    mean = _mean(counts)
    return counts.std(axis=-1, where=counts >= 0) / np.where(mean > 0, mean, 1.0)


def normalized_entropy(counts: np.ndarray) -> np.ndarray:
    """Shannon entropy of the shares p_i = n_i / sum n, over its maximum: ``-sum p ln p / ln E``.

    Without unit; 1 at balance, ln K / ln E when all tokens go to the same K experts. One
    expert alone is balanced.
    """
    num_experts = num_existing(counts)
    mean = _mean(counts)
    total = (mean * num_experts)[..., None]
    shares = counts / np.where(total > 0, total, 1.0)
    entropy = -(shares * np.log(np.where(shares > 0, shares, 1.0))).sum(axis=-1)
    several = (mean > 0) & (num_experts > 1)
    return np.where(several, entropy / np.log(np.maximum(num_experts, 2)), 1.0)


def num_dead_experts(counts: np.ndarray) -> np.ndarray:
    """Experts that received no token at all, int64 in [0, E]; E where nothing was routed."""
    return (counts == 0).sum(axis=-1)


def relative_load(counts: np.ndarray) -> np.ndarray:
    """Each expert's count over the balanced count, ``(..., E)``: 1 at balance, at most E/K; NaN
    for an expert that the layer does not have."""
    return np.where(counts >= 0, _relative(counts, counts, keepdims=True), np.nan)


def extreme_experts(
    values_ME: np.ndarray, number: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Row and expert of the ``number`` largest values, descending, and of the smallest, ascending.

    Args:
        values_ME: a number of each expert, NaN for one that a layer does not have.
        number: length of each list, if there are as many.
    """
    # NaNs are sorted to the end.
    order = np.argsort(values_ME, axis=None, kind="stable")[: np.isfinite(values_ME).sum()]
    places = [divmod(index, values_ME.shape[1]) for index in order.tolist()]
    return places[::-1][:number], places[:number]


def _relative(values: np.ndarray, counts: np.ndarray, keepdims: bool = False) -> np.ndarray:
    mean = _mean(counts)[..., None] if keepdims else _mean(counts)
    return np.where(mean > 0, values / np.where(mean > 0, mean, 1.0), 1.0)


def mark_absent(counts: np.ndarray, num_experts_N: np.ndarray) -> np.ndarray:
    """Counts ``(N, ..., E)`` of N layers, :data:`ABSENT` beyond the experts that each has."""
    absent_NE = np.arange(counts.shape[-1]) >= num_experts_N[:, None]
    absent = absent_NE.reshape(len(counts), *[1] * (counts.ndim - 2), -1)
    return np.where(absent, ABSENT, counts)


def num_existing(counts: np.ndarray) -> np.ndarray:
    """Experts that each layer has, int64 ``(...)``."""
    return counts.shape[-1] - np.count_nonzero(counts < 0, axis=-1)


def _mean(counts: np.ndarray) -> np.ndarray:
    return counts.clip(min=0).sum(axis=-1, dtype=np.float64) / num_existing(counts)
