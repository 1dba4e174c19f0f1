"""Log-normal loads: one number says how uneven experts are.

Of the distributions that were fitted to recorded loads of DeepSeek-V3, the log-normal one
came closest (DeepEP pull request #393).
"""

from __future__ import annotations

import numpy as np

DRAWS = 16


def lognormal_loads(
    sigma: float, *, num_layers: int, num_experts: int, top_k: int, draws: int = DRAWS
) -> np.ndarray:
    """Shares of the tokens ``(draws, num_layers, num_experts)``, always the same ones.

    The logarithms are normal with a standard deviation of sigma. No expert gets more than
    1/K of what is routed, since a token chooses it once: the others share what is cut off.
    """
    normal = np.random.default_rng(0).standard_normal((draws, num_layers, num_experts))
    shares = np.exp(sigma * (normal - normal.max(axis=-1, keepdims=True)))
    shares /= shares.sum(axis=-1, keepdims=True)
    full = np.zeros(shares.shape, dtype=bool)
    while (above := shares > (1 + 1e-12) / top_k).any():
        full |= above
        rest = np.where(full, 0.0, shares)
        room = 1 - full.sum(axis=-1, keepdims=True) / top_k
        rest *= room / np.maximum(rest.sum(axis=-1, keepdims=True), np.finfo(float).tiny)
        shares = np.where(full, 1 / top_k, rest)
    return shares


def fitted_sigma(counts: np.ndarray) -> float:
    """The sigma whose loads are as uneven: of the same coefficient of variation.

    Args:
        counts: tokens of each expert ``(..., E)``; the rest are layers and micro-batches.
    """
    shares = counts / np.maximum(counts.mean(axis=-1, keepdims=True), np.finfo(float).tiny)
    return float(np.sqrt(np.log1p(shares.var(axis=-1).mean())))
