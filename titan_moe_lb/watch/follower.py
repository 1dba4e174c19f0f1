"""What is new in the trace of a run that still writes it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from titan_moe_lb.errors import JobError
from titan_moe_lb.traces.balance_statistics import max_violation
from titan_moe_lb.traces.run_info import RunInfo
from titan_moe_lb.traces.step_load import StepLoad
from titan_moe_lb.traces.trace import TraceReader, trace_file

SECONDS_OF_RATE = 60.0
"""The rate is that of the last minute."""


class Follower:
    """The last whole step of a growing trace, and what led to it.

    Attributes:
        info: of the run.
        step, load: the last whole step; valid once :meth:`look` has returned True.
        max_violations: MaxVio of every step read, mean over the layers.
    """

    info: RunInfo
    step: int
    load: StepLoad

    def __init__(self, run_dir: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._run_dir = run_dir
        self._clock = clock
        self._reader: TraceReader | None = None
        self._file: tuple[int, int] | None = None
        self._looks: deque[tuple[float, int]] = deque()
        self.max_violations: list[float] = []

    def look(self, must_exist: bool = False) -> bool:
        """Read what came since the last look.

        Args:
            must_exist: raise when there is no trace yet.

        Returns:
            Whether there was a new step.

        Raises:
            JobError: the file is not a trace.
        """
        file = trace_file(self._run_dir)
        if not must_exist and not file.exists():
            return False
        if self._reader is None or self._file != _identity(file):
            # Also when a resumed run has replaced the file.
            self._reader = TraceReader(self._run_dir)
            self._file = _identity(file)
            self.max_violations.clear()
            self._looks.clear()
        news = False
        for step, load in self._reader:
            self.step, self.load, news = step, load, True
            self.max_violations.append(float(max_violation(self.load.counts_ME).mean()))
        if must_exist and not news:
            raise JobError(f"{file} holds no whole step yet: look again later")
        self.info = self._reader.info
        if news:
            self._looks.append((self._clock(), self.step))
            while self._looks[-1][0] - self._looks[0][0] > SECONDS_OF_RATE:
                self._looks.popleft()
        return news

    @property
    def steps_per_second(self) -> float | None:
        """Optimizer steps a second as seen from the file's growth; None before it has grown."""
        (first_time, first_step), (last_time, last_step) = self._looks[0], self._looks[-1]
        if last_time == first_time:
            return None
        return (last_step - first_step) / (last_time - first_time)


def _identity(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_dev, status.st_ino
