"""Number of training tokens so far, for schedules by tokens."""

from __future__ import annotations

import torch

from titan_moe_lb.balancing.recording.step_record import StepSums


class SeenTokens:
    """Number of tokens of the finished steps over all ranks, including padding.

    In torchtitan's Trainer every step has the same number. In another loop the number follows from
    the counts of a step, which stay on the device until the next step begins.

    Attributes:
        total: tokens of the finished steps, except of one whose count is still on the device.
        counted: True if the device counts tokens, because steps differ.
    """

    def __init__(self, before: int, per_step: int | None, *, counted: bool) -> None:
        """Start from the tokens of a checkpoint.

        ``per_step`` is None if steps differ.
        """
        self.total = before
        self.counted = counted
        self._per_step = per_step or 0
        self._unread: torch.Tensor | None = None

    def finish_step(self, sums: StepSums | None, top_k: int) -> None:
        """Add a finished step."""
        self.total += self._per_step
        if self.counted:
            assert sums is not None
            self._unread = sums.counts_NSE[0, 0].sum() // top_k

    def read(self) -> None:
        """Add the tokens that the device counted in the last step; call it between two steps."""
        if self._unread is not None:
            self.total += int(self._unread)
            self._unread = None
