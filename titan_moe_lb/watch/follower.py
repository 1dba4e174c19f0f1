"""What is new in the trace of a run that still writes it."""

from __future__ import annotations

from pathlib import Path

from titan_moe_lb.errors import JobError
from titan_moe_lb.traces.balance_statistics import max_violation
from titan_moe_lb.traces.run_info import RunInfo
from titan_moe_lb.traces.step_load import StepLoad
from titan_moe_lb.traces.trace import TraceReader, trace_file


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

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._reader: TraceReader | None = None
        self._file: tuple[int, int] | None = None
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
        news = self._reader.read()
        if len(news.steps):
            self.info, self.step, self.load = news.info, int(news.steps[-1]), news.load(-1)
            self.max_violations += max_violation(news.counts_SME).mean(axis=1).tolist()
        elif must_exist:
            raise JobError(f"{file} holds no whole step yet: look again later")
        return bool(len(news.steps))


def _identity(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_dev, status.st_ino
