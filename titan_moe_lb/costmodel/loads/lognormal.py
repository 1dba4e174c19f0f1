"""Log-normal loads: one number, sigma, sets how uneven experts are.

Among the distributions fitted to recorded DeepSeek-V3 loads, the log-normal one came closest
(DeepEP pull request #393).
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from titan_moe_lb.costmodel.times.moe_layer import MoELayer
from titan_moe_lb.errors import JobError

DRAWS = 16
MOST_SIGMA = 5.0
STEPS = 10_000
"""Grid points of the search for a sigma, in each unit of sigma."""


@dataclass(frozen=True)
class Spread:
    """Log-normal loads of one sigma."""

    sigma: float
    name: str
    """Name in tables."""

    @property
    def description(self) -> str:
        """Phrase for sentences."""
        factor, is_overload, degree = self.name.partition("@")
        if is_overload:
            return f"log-normal loads with an overload of {factor} at EP {degree}"
        return f"log-normal loads of sigma {self.sigma:.3g}"

    def loads(self, layers: Sequence[MoELayer]) -> np.ndarray:
        """Draw :func:`lognormal_loads` for these layers.

        Raises:
            JobError: the layers differ in number of experts or top_k.
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
    """Measured overload factor of an expert-parallel group.

    The factor is the load of the busiest rank over the mean load, averaged over layers and
    micro-batches.
    """

    factor: float
    ep_degree: int

    def __str__(self) -> str:
        return f"overload:{self.factor:g}@{self.ep_degree}"

    def spread(self, layers: Sequence[MoELayer]) -> Spread:
        """Find the log-normal loads that have this factor, with experts placed in blocks.

        Raises:
            JobError: the ranks do not divide the experts, or no log-normal loads are that uneven.
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
    """Draw shares of the tokens ``(draws, num_layers, num_experts)`` with a fixed seed.

    The logarithms are normal with standard deviation ``sigma``. A token chooses an expert once,
    so each share is capped at 1/K. The other experts get the excess, in proportion to their
    shares.
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
    """Estimate the sigma of log-normal loads from the variation of counts ``(..., E)``.

    ``sqrt(ln(1 + CV^2))``, from the moments of the log-normal distribution. CV^2 is the mean
    over the leading dimensions.
    """
    shares = counts / np.maximum(counts.mean(axis=-1, keepdims=True), np.finfo(float).tiny)
    return float(np.sqrt(np.log1p(shares.var(axis=-1).mean())))
