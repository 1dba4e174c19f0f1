"""Window of a diagnosis: the end of a run, its loads, and the loads that chance makes.

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
"""Logged steps that a diagnosis needs."""
SURE = 1000
"""Balanced routing makes a finding anywhere in the model once in so many runs."""


@dataclass(frozen=True)
class Window:
    """The last quarter of the logged steps, at least :data:`FEWEST_STEPS`."""

    trace: Trace

    @cached_property
    def first(self) -> int:
        """Index of its first step."""
        steps = len(self.trace.steps)
        return steps - max(FEWEST_STEPS, steps // 4)

    @cached_property
    def counts_SME(self) -> np.ndarray:
        return self.trace.counts_SME[self.first :]

    @cached_property
    def load_ME(self) -> np.ndarray:
        """Load of the window as a whole, relative to balance; NaN where a layer has no such expert."""
        return relative_load(self.counts_SME.sum(axis=0))

    @cached_property
    def balanced_M(self) -> np.ndarray:
        """Tokens of an expert in the whole window at balance."""
        return self._routed_M / self.trace.info.num_experts_M

    @cached_property
    def _routed_M(self) -> np.ndarray:
        return self.counts_SME.sum(axis=0).clip(min=0).sum(axis=1)

    @cached_property
    def violation_M(self) -> np.ndarray:
        """MaxVio of the steps, mean over the window."""
        return max_violation(self.counts_SME).mean(axis=0)

    @cached_property
    def lasting_M(self) -> np.ndarray:
        """MaxVio of the window as a whole: the lasting excess of the same experts."""
        return np.nanmax(self.load_ME, axis=1) - 1

    def lasts(self, violation_M: np.ndarray) -> np.ndarray:
        """Layers ``(M,)`` whose lasting MaxVio is above that of ``violation_M`` and of chance."""
        return (self.lasting_M > violation_M) & self.beyond_chance(1 + self.lasting_M)

    @cached_property
    def uneven_M(self) -> np.ndarray:
        """MaxVio above which a load is bad: an expert with twice its share makes the ranks that
        wait for it take twice as long. Where K is above E/3, half of the worst, E/K - 1."""
        info = self.trace.info
        return np.minimum(1.0, (info.num_experts_M / info.top_k_M - 1) / 2)

    def beyond_chance(self, load: np.ndarray, experts: np.ndarray | int = 1) -> np.ndarray:
        """Whether balanced routing would hardly make such a load of the window.

        A Poisson count of mean n is ``load`` times its mean, or further from it, with a
        probability of at most ``exp(-n h(load))``, ``h(x) = x ln x - x + 1`` (Chernoff). All
        experts of all layers together are within it but once in :data:`SURE` runs.

        Args:
            load: relative to balance, of each layer ``(M,)`` or expert ``(M, E)``.
            experts: number of experts of each layer that share the load.
        """
        h = load * np.log(np.maximum(load, 1e-300)) - load + 1
        tokens_M = self.balanced_M * experts
        bound = math.log(SURE * self.trace.info.num_experts_M.sum())
        return tokens_M.reshape(-1, *[1] * (load.ndim - 1)) * h > bound

    def by_chance(self, statistic: Callable[[np.ndarray], np.ndarray], tokens: float) -> np.ndarray:
        """Mean of a statistic of the counts under balanced routing, for each layer ``(M,)``.

        Args:
            statistic: function of counts ``(..., E)``.
            tokens: number of tokens; the draws of their experts are the same in every call.
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
        return float(self._routed_M[0] / self.trace.info.top_k_M[0] / len(self.counts_SME))

    def since(self, excess_S: np.ndarray) -> int:
        """Logged step since which ``excess_S``, of all logged steps, is above 0: the minimum of its
        running sum, so that single steps against the trend do not count."""
        start = np.argmin(np.concatenate([[0.0], np.cumsum(excess_S[:-1])]))
        return int(self.trace.steps[start])

    def column(self, name: str) -> np.ndarray | None:
        """A column of the layers ``(S, M)`` or of the step ``(S,)``; None where it is not known."""
        values = (self.trace.layer_columns | self.trace.step_columns).get(name)
        if values is None or np.isnan(values[self.first :]).all():
            return None
        return values[self.first :]

    def numbers(self, chosen_M: np.ndarray) -> tuple[int, ...]:
        """Numbers of some layers in the whole model."""
        return tuple(self.trace.layers[i] for i in np.flatnonzero(chosen_M))

    def layers(self, chosen_M: np.ndarray) -> str:
        """Numbers of some layers, in words."""
        numbers = self.numbers(chosen_M)
        if len(numbers) == len(self.trace.layers) > 1:
            return f"all {len(numbers)} layers"
        shown = ", ".join(map(str, numbers[:6]))
        more = f" and {len(numbers) - 6} more" if len(numbers) > 6 else ""
        return f"layer{'s' if len(numbers) > 1 else ''} {shown}{more}"

    def experts(self, chosen_ME: np.ndarray) -> tuple[tuple[int, int], ...]:
        """Layer and number of some experts, the fullest first."""
        chosen = zip(*(index.tolist() for index in np.nonzero(chosen_ME)), strict=True)
        ordered = sorted(chosen, key=lambda place: -self.load_ME[place])
        return tuple((self.trace.layers[row], expert) for row, expert in ordered)


def effective_experts(counts: np.ndarray) -> np.ndarray:
    """Number of balanced experts with the entropy of the load ``(..., E)``, in [K, E]."""
    return num_existing(counts) ** normalized_entropy(counts)
