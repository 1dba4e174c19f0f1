"""Loads of a recorded run, cut to the micro-batches of a planned job."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from titan_moe_lb.traces.step_windows import tenth

MOST_LOADS = 32
"""Micro-batches of a window that are planned with; of more, as many evenly."""


@dataclass(frozen=True, kw_only=True)
class RecordedLoads:
    """A run's tokens per expert: S steps, M MoE layers in order, E experts."""

    counts_SME: np.ndarray
    """Counts of whole global batches."""
    micro_batch_counts_SME: np.ndarray
    """Counts of single micro-batches ``(S', M, E)``; empty where the run has none."""
    expert_groups: tuple[int, ...]
    """Into how many groups of neighbours that stay together, coarse to fine."""
    ep_degree: int
    max_overload_factor: float
    """The most that any micro-batch of the second half had at the run's own EP degree."""

    @property
    def has_micro_batches(self) -> bool:
        return len(self.micro_batch_counts_SME) > 0

    @property
    def window(self) -> int:
        """Steps at the beginning and at the end: a tenth."""
        return tenth(len(self.counts_SME))

    @property
    def half(self) -> int:
        return len(self.counts_SME) // 2

    def known(self, steps: slice) -> np.ndarray:
        """Tokens per expert of the steps together ``(M, E)``: what a placement is made for."""
        return self.counts_SME[steps].sum(axis=0)

    def micro_batches(self, steps: slice, tokens: float) -> np.ndarray:
        """Loads of micro-batches of about so many routed tokens ``(N, M, E)``.

        Where the planned job's are larger than the run's, neighbouring ones are put
        together; smaller ones cannot be had. Without any the global batches stand in.

        Args:
            steps: of the run; the micro-batches of those steps.
            tokens: tokens x top_k that a layer dispatches together.
        """
        counts = self.micro_batch_counts_SME if self.has_micro_batches else self.counts_SME
        # A run that was continued may have micro-batches of its later steps alone.
        start, stop, _stride = steps.indices(len(self.counts_SME))
        missing = len(self.counts_SME) - len(counts)
        counts = counts[max(0, start - missing) : max(1, stop - missing)]
        each = counts[:, 0].sum(axis=-1).mean()
        together = int(np.clip(round(tokens / max(each, 1.0)), 1, len(counts)))
        groups = len(counts) // together
        chosen = np.unique(np.linspace(0, groups - 1, min(groups, MOST_LOADS)).astype(int))
        grouped = counts[: groups * together].reshape(groups, together, *counts.shape[1:])
        return grouped[chosen].sum(axis=1)
