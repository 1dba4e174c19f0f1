"""Log-normal loads: one number says how uneven experts are.

Of the distributions that were fitted to recorded loads of DeepSeek-V3, the log-normal one
came closest (DeepEP pull request #393).
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from titan_moe_lb.costmodel.times.layer import MoELayer
from titan_moe_lb.errors import JobError

DRAWS = 16
MOST_SIGMA = 5.0
STEPS = 10_000
"""Steps of the search for a sigma, in each unit of sigma."""


@dataclass(frozen=True)
class Spread:
    """Unevenness of log-normal loads."""

    sigma: float
    name: str
    """Name in tables."""

    @property
    def description(self) -> str:
        """Wording in sentences."""
        return f"log-normal loads of sigma {self.sigma:.3g}"

    def loads(self, layers: Sequence[MoELayer]) -> np.ndarray:
        """:func:`lognormal_loads` of these layers.

        Raises:
            JobError: their numbers of experts or top_k differ.
        """
        if len({(layer.num_experts, layer.top_k) for layer in layers}) > 1:
            raise JobError(
                f"--imbalance {self.name}: the layers of the model have several numbers of experts "
                "or top_k, and log-normal loads need one; give imbalance factors"
            )
        return lognormal_loads(
            self.sigma,
            num_layers=len(layers),
            num_experts=layers[0].num_experts,
            top_k=layers[0].top_k,
        )


@dataclass(frozen=True)
class Overload:
    """A measured overload factor: the load of the busiest rank of an expert-parallel group over
    the mean, in the mean over layers and micro-batches."""

    factor: float
    ep_degree: int

    def __str__(self) -> str:
        return f"overload:{self.factor:g}@{self.ep_degree}"

    def spread(self, layers: Sequence[MoELayer]) -> Spread:
        """The log-normal loads that have it, with experts placed in blocks.

        Raises:
            JobError: the ranks do not divide the experts, or cannot be that unevenly loaded.
        """
        num_experts, top_k = layers[0].num_experts, layers[0].top_k
        if num_experts % self.ep_degree:
            raise JobError(
                f"--imbalance {self}: {self.ep_degree} ranks do not divide {num_experts} experts"
            )

        def spread(step: int) -> Spread:
            return Spread(sigma=step / STEPS, name=f"{self.factor:.2f}@{self.ep_degree}")

        def factor(step: int) -> float:
            shares = spread(step).loads(layers)
            of_ranks = shares.reshape(*shares.shape[:-1], self.ep_degree, -1).sum(axis=-1)
            return float(of_ranks.max(axis=-1).mean()) * self.ep_degree

        last = round(MOST_SIGMA * STEPS)
        most = factor(last)
        if self.factor > most:
            raise JobError(
                f"--imbalance {self} is above {most:.3g}, which log-normal loads reach at EP "
                f"{self.ep_degree} with {top_k} of {num_experts} experts"
            )
        return spread(bisect.bisect_left(range(last), self.factor, key=factor))


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
