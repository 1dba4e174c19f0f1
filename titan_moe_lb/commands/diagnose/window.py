"""Window of a diagnosis: the end of a run, its loads, and bounds on sampling noise.

Shape suffixes: S = steps of the window, M = MoE layers, E = experts.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from titan_moe_lb.traces.balance_statistics import (
    max_violation,
    normalized_entropy,
    num_existing,
    relative_load,
)
from titan_moe_lb.traces.trace import Trace

FEWEST_STEPS = 5
"""Fewest logged steps of a diagnosis."""
SURE = 1000
"""Sampling noise of balanced routing causes at most one finding in this many runs."""


@dataclass(frozen=True)
class Window:
    """Last quarter of the logged steps of a trace, at least :data:`FEWEST_STEPS`.

    Steps before a resumed run that changed the balancing are left out.
    """

    trace: Trace

    @property
    def is_long_enough(self) -> bool:
        """True if there are enough steps for a diagnosis."""
        return len(self.trace.steps) - self.trace.balanced_since >= FEWEST_STEPS

    @cached_property
    def first(self) -> int:
        """Index of the first step of the window among the logged steps."""
        steps = len(self.trace.steps)
        return steps - max(FEWEST_STEPS, (steps - self.trace.balanced_since) // 4)

    @cached_property
    def counts_SME(self) -> np.ndarray:
        """Tokens of each expert in each step of the window."""
        return self.trace.counts_SME[self.first :]

    @cached_property
    def load_ME(self) -> np.ndarray:
        """Load over the whole window, relative to balance; NaN for an absent expert."""
        return relative_load(self.counts_SME.sum(axis=0))

    @cached_property
    def balanced_M(self) -> np.ndarray:
        """Balanced number of tokens of an expert over the whole window."""
        return self._routed_M / self.trace.info.num_experts_M

    @cached_property
    def _routed_M(self) -> np.ndarray:
        """Routed tokens (tokens x top_k) of each layer over the whole window."""
        return self.counts_SME.sum(axis=0).clip(min=0).sum(axis=1)

    @cached_property
    def violation_M(self) -> np.ndarray:
        """MaxVio of a step, mean over the window."""
        return max_violation(self.counts_SME).mean(axis=0)

    @cached_property
    def lasting_M(self) -> np.ndarray:
        """MaxVio of the whole window: the excess that stays with the same experts."""
        return np.nanmax(self.load_ME, axis=1) - 1

    def lasts(self, violation_M: np.ndarray) -> np.ndarray:
        """Find layers whose lasting MaxVio exceeds ``violation_M`` and noise, bool ``(M,)``."""
        return (self.lasting_M > violation_M) & self.beyond_chance(1 + self.lasting_M)

    @cached_property
    def uneven_M(self) -> np.ndarray:
        """MaxVio above which a load is bad: 1, or half of the maximum E/K - 1 if that is less.

        At 1, an expert has twice its share, and the ranks that wait for it take twice as long.
        """
        info = self.trace.info
        return np.minimum(1.0, (info.num_experts_M / info.top_k_M - 1) / 2)

    def beyond_chance(self, load: np.ndarray, experts: np.ndarray | int = 1) -> np.ndarray:
        """Find the loads of the window that sampling noise does not explain.

        The Chernoff bound of a Poisson count of mean n is
        ``P(count at least as far from n as x n) <= exp(-n h(x))`` with ``h(x) = x ln x - x + 1``.
        By the union bound over all experts of all layers, balanced routing exceeds the threshold
        at most once in :data:`SURE` runs.

        Args:
            load: load relative to balance, of each layer ``(M,)`` or expert ``(M, E)``.
            experts: number of experts of each layer that share the load.

        Returns:
            bool, in the shape of ``load``.
        """
        h = load * np.log(np.maximum(load, 1e-300)) - load + 1
        tokens_M = self.balanced_M * experts
        bound = math.log(SURE * self.trace.info.num_experts_M.sum())
        return tokens_M.reshape(-1, *[1] * (load.ndim - 1)) * h > bound

    def by_chance(self, statistic: Callable[[np.ndarray], np.ndarray], tokens: float) -> np.ndarray:
        """Estimate the mean of a statistic under balanced random routing, for each layer ``(M,)``.

        The random numbers have a fixed seed.

        Args:
            statistic: function of counts ``(..., E)``.
            tokens: number of tokens.
        """

        @functools.cache
        def mean(num_experts: int, top_k: int) -> float:
            choices = round(min(tokens * top_k, 1e12))
            even_E = np.full(num_experts, 1 / num_experts)
            return statistic(np.random.default_rng(0).multinomial(choices, even_E, 32)).mean()

        info = self.trace.info
        kinds = zip(info.num_experts_M.tolist(), info.top_k_M.tolist(), strict=True)
        return np.array([mean(*kind) for kind in kinds])

    @property
    def tokens_per_step(self) -> float:
        """Mean number of tokens of a step."""
        return float(self._routed_M[0] / self.trace.info.top_k_M[0] / len(self.counts_SME))

    def since(self, excess_S: np.ndarray) -> int:
        """Find the logged step since which an excess is mostly above 0.

        It is the step after the minimum of the running sum, so single steps do not matter.

        Args:
            excess_S: excess in every logged step of the run, not only of the window.
        """
        begin = self.trace.balanced_since
        start = begin + np.argmin(np.concatenate([[0.0], np.cumsum(excess_S[begin:-1])]))
        return int(self.trace.steps[start])

    def column(self, name: str) -> np.ndarray | None:
        """Return a column, ``(S, M)`` of layers or ``(S,)`` of the step; None if it is missing."""
        values = (self.trace.layer_columns | self.trace.step_columns).get(name)
        if values is None or np.isnan(values[self.first :]).all():
            return None
        return values[self.first :]

    def numbers(self, chosen_M: np.ndarray) -> tuple[int, ...]:
        """Return the numbers of the chosen layers in the whole model."""
        return tuple(self.trace.layers[i] for i in np.flatnonzero(chosen_M))

    def layers(self, chosen_M: np.ndarray) -> str:
        """Format the numbers of the chosen layers for a message."""
        numbers = self.numbers(chosen_M)
        if len(numbers) == len(self.trace.layers) > 1:
            return f"all {len(numbers)} layers"
        shown = ", ".join(map(str, numbers[:6]))
        more = f" and {len(numbers) - 6} more" if len(numbers) > 6 else ""
        return f"layer{'s' if len(numbers) > 1 else ''} {shown}{more}"

    def experts(self, chosen_ME: np.ndarray) -> tuple[tuple[int, int], ...]:
        """Return layer and number of the chosen experts, the fullest first."""
        chosen = zip(*(index.tolist() for index in np.nonzero(chosen_ME)), strict=True)
        ordered = sorted(chosen, key=lambda place: -self.load_ME[place])
        return tuple((self.trace.layers[row], expert) for row, expert in ordered)


def effective_experts(counts: np.ndarray) -> np.ndarray:
    """Compute the number of balanced experts that have the entropy of the load, in [K, E].

    Args:
        counts: counts ``(..., E)``.
    """
    return num_existing(counts) ** normalized_entropy(counts)


def mean_over_steps(values_SM: np.ndarray) -> np.ndarray:
    """Compute the mean of the steps that have a number ``(M,)``; NaN for a layer without one."""
    return np.ma.filled(np.ma.masked_invalid(values_SM).mean(axis=0), np.nan)
