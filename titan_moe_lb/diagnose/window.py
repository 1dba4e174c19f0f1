"""The end of a run, which a diagnosis looks at.

Shape suffixes: S = steps of the window, M = MoE layers, E = experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from titan_moe_lb.traces.balance_statistics import max_violation, normalized_entropy, relative_load
from titan_moe_lb.traces.trace import Trace

FEWEST_STEPS = 5
"""Logged steps of a run that has anything to say."""


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
    def load_SME(self) -> np.ndarray:
        """Relative to balance."""
        return relative_load(self.counts_SME)

    @cached_property
    def violation_M(self) -> np.ndarray:
        """MaxVio of each layer, mean over the window."""
        return max_violation(self.counts_SME).mean(axis=0)

    @cached_property
    def effective_experts_M(self) -> np.ndarray:
        """As many balanced experts would have the entropy of the load: from K to E."""
        entropy_SM = normalized_entropy(self.counts_SME)
        return (self.counts_SME.shape[-1] ** entropy_SM).mean(axis=0)

    def figure_SM(self, name: str) -> np.ndarray | None:
        """A figure of the layers; None where the trace lacks it."""
        values_SM = self.trace.figures.get(name)
        if values_SM is None or np.isnan(values_SM[self.first :]).all():
            return None
        return values_SM[self.first :]

    def step_figure_S(self, name: str) -> np.ndarray | None:
        values_S = self.trace.step_figures.get(name)
        if values_S is None or np.isnan(values_S[self.first :]).all():
            return None
        return values_S[self.first :]

    def chance_violation(self, tokens: float) -> float:
        """MaxVio that chance alone leaves of so many balanced tokens: the largest of E Poisson
        counts of mean ``tokens K / E`` is about ``sqrt(2 ln E)`` deviations above the mean."""
        info = self.trace.info
        mean = max(tokens * info.top_k / info.num_experts, 1.0)
        return math.sqrt(2 * math.log(max(info.num_experts, 2)) / mean)

    @property
    def tokens_per_step(self) -> int:
        return self.trace.info.global_batch_size * self.trace.info.seq_len

    @property
    def is_forced(self) -> bool:
        return self.trace.info.forced_routing is not None

    def layers(self, chosen_M: np.ndarray) -> str:
        """Numbers of some layers, in words."""
        numbers = [self.trace.layers[i] for i in np.flatnonzero(chosen_M)]
        if len(numbers) == len(self.trace.layers) > 1:
            return f"all {len(numbers)} layers"
        shown = ", ".join(map(str, numbers[:6]))
        more = f" and {len(numbers) - 6} more" if len(numbers) > 6 else ""
        return f"layer{'s' if len(numbers) > 1 else ''} {shown}{more}"
