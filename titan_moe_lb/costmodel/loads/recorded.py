"""Loads of a recorded run, regrouped to the size of a planned job's micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from titan_moe_lb.traces.step_windows import tenth

MOST_LOADS = 32
"""Most micro-batches that a plan uses from a window; it samples a longer one evenly."""


@dataclass(frozen=True, kw_only=True)
class RecordedLoads:
    """Tokens per expert of a run: S steps, M MoE layers in order, E experts."""

    counts_SME: np.ndarray
    """Counts of whole global batches."""
    micro_batch_counts_SME: np.ndarray
    """Counts of single micro-batches ``(S', M, E)``; empty if the run has none."""
    expert_groups: tuple[int, ...]
    """Numbers of equal groups of neighbouring experts that stay together, coarse to fine."""
    ep_degree: int
    max_overload_factor: float
    """Largest overload factor of a micro-batch in the second half, at the run's EP degree."""

    @property
    def has_micro_batches(self) -> bool:
        """True if the run recorded single micro-batches."""
        return len(self.micro_batch_counts_SME) > 0

    @property
    def window(self) -> int:
        """Number of steps in the first and in the last tenth of the run, at least 1."""
        return tenth(len(self.counts_SME))

    @property
    def half(self) -> int:
        """Number of steps in the first half of the run."""
        return len(self.counts_SME) // 2

    def known(self, steps: slice) -> np.ndarray:
        """Sum tokens per expert over steps, ``(M, E)``: the load that experts are placed for."""
        return self.counts_SME[steps].sum(axis=0)

    def micro_batches(
        self, steps: slice, tokens: float, most: int | None = MOST_LOADS
    ) -> np.ndarray:
        """Select loads of micro-batches with about this many routed tokens, ``(N, M, E)``.

        If the planned micro-batches are larger than the recorded ones, neighbouring ones are
        summed. Recorded ones are never split. A run without micro-batches contributes its global
        batches instead.

        Args:
            steps: steps of the run whose micro-batches are read.
            tokens: tokens x top_k that a layer of the planned job dispatches together.
            most: number of loads to sample evenly from more; None for all.
        """
        counts = self.micro_batch_counts_SME if self.has_micro_batches else self.counts_SME
        # A resumed run may have micro-batches of its later steps alone.
        start, stop, _stride = steps.indices(len(self.counts_SME))
        missing = len(self.counts_SME) - len(counts)
        counts = counts[max(0, start - missing) : max(1, stop - missing)]
        each = counts[:, 0].sum(axis=-1).mean()
        together = int(np.clip(round(tokens / max(each, 1.0)), 1, len(counts)))
        groups = len(counts) // together
        chosen = np.unique(np.linspace(0, groups - 1, min(groups, most or groups)).astype(int))
        grouped = counts[: groups * together].reshape(groups, together, *counts.shape[1:])
        return grouped[chosen].sum(axis=1)
