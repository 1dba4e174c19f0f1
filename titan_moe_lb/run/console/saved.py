"""Checkpoint and trace that a run has saved, for its last message."""

from __future__ import annotations

import os
from typing import Any

from titan_moe_lb.checkpoints.resume_point import is_finished, is_remote, own_folder, steps_in
from titan_moe_lb.errors import JobError
from titan_moe_lb.traces.trace import last_step, trace_file


class Saved:
    """What a run saves from now on; as a string, its latest checkpoint and last step of the trace.

    Args:
        config: a ``Trainer.Config``.
    """

    def __init__(self, config: Any) -> None:
        self._config = config
        self.trace = trace_file(config.dump_folder)
        self._trace_before = self._identity_of_trace()

    def __str__(self) -> str:
        return f"{self._checkpoint()}, {self._last_step()}"

    @property
    def checkpoint(self) -> int | None:
        """Latest step that was saved completely.

        None if there is none, if checkpoints are off, or if their folder is remote.
        """
        if not self._config.checkpoint.enable or is_remote(self._config):
            return None
        steps = steps_in(own_folder(self._config))
        return max((step for step, path in steps.items() if is_finished(path)), default=None)

    @property
    def has_trace(self) -> bool:
        """True if the trace's file has another status than at the start, whatever its time."""
        return self._identity_of_trace() not in (None, self._trace_before)

    def _identity_of_trace(self) -> tuple[int, ...] | None:
        try:
            status = os.stat(self.trace)
        except OSError:
            return None
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns

    def _checkpoint(self) -> str:
        if not self._config.checkpoint.enable:
            return "no checkpoint (checkpoint.enable is off)"
        if is_remote(self._config):
            return f"checkpoints in {self._config.checkpoint.folder}"
        step = self.checkpoint
        if step is None:
            return "no checkpoint yet"
        return f"checkpoint of step {step} ({own_folder(self._config) / f'step-{step}'})"

    def _last_step(self) -> str:
        try:
            step = last_step(self.trace) if self.has_trace else None
        except JobError:
            step = None
        return "no trace" if step is None else f"trace up to step {step} ({self.trace})"
