"""Tokens of training so far, for changes after a number of tokens."""

from __future__ import annotations

import torch

from titan_moe_lb.balancing.recording.step_record import StepSums


class SeenTokens:
    """Tokens of the finished steps over all ranks, padding included.

    torchtitan's Trainer has the same number in every step. In another loop the counts of a step
    contain it. They stay on the device until the next step begins.

    Attributes:
        total: of the steps that were read.
        counted: the device counts, because steps differ.
    """

    def __init__(self, before: int, per_step: int | None, *, counted: bool) -> None:
        """
        Args:
            before: tokens of the checkpoint that the loop resumes from.
            per_step: tokens of every step; None where they differ.
        """
        self.total = before
        self.counted = counted
        self._per_step = per_step or 0
        self._unread: torch.Tensor | None = None

    def finish_step(self, sums: StepSums | None, top_k: int) -> None:
        """Add a step.

        Args:
            sums: of the step, where tokens are counted.
            top_k: of the first router.
        """
        self.total += self._per_step
        if self.counted:
            assert sums is not None
            self._unread = sums.counts_NSE[0, 0].sum() // top_k

    def read(self) -> None:
        """Between two steps: add what the device has counted in the last one."""
        if self._unread is not None:
            self.total += int(self._unread)
            self._unread = None
