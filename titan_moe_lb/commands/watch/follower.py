"""Reader of the growing trace of a live run."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import numpy as np

from titan_moe_lb.commands.diagnose.checks import findings
from titan_moe_lb.commands.diagnose.finding import Finding
from titan_moe_lb.errors import JobError
from titan_moe_lb.traces.balance_statistics import max_violation
from titan_moe_lb.traces.run_info import RunInfo
from titan_moe_lb.traces.step_load import StepLoad
from titan_moe_lb.traces.trace import Trace, TraceReader, trace_file

MOST_RECENT = 200
"""Logged steps in memory, enough to diagnose the end of a run."""


class Follower:
    """Last whole step of a growing trace, with recent history.

    All attributes but ``max_violations`` are unset until :meth:`look` has returned True.

    Attributes:
        info: description of the run.
        step: number of the last whole step.
        load: load of the last whole step.
        written: time when the trace last grew, in seconds since the epoch.
        findings: diagnosis of the recent steps; empty if they are too few.
        max_violations: MaxVio of every step read, mean over the layers.
    """

    info: RunInfo
    step: int
    load: StepLoad
    written: float
    findings: list[Finding]

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._reader: TraceReader | None = None
        self._file: tuple[int, int] | None = None
        self._recent: Trace | None = None
        self.max_violations: list[float] = []
        self._intervals: list[float] = []
        self._previous = np.nan

    @property
    def seconds_between_steps(self) -> float | None:
        """Median seconds between two logged steps; None if the trace has no times."""
        return median(self._intervals) if self._intervals else None

    def look(self, must_exist: bool = False) -> bool:
        """Read the steps since the last call.

        Args:
            must_exist: raise if there is no trace or no whole step yet.

        Returns:
            True if there was a new step.

        Raises:
            JobError: the file is no trace; or see ``must_exist``.
        """
        file = trace_file(self._run_dir)
        if not must_exist and not file.exists():
            return False
        if self._reader is None or self._file != _identity(file):
            # First call, or a resumed run has replaced the file.
            self._reader = TraceReader(self._run_dir)
            self._file = _identity(file)
            self.max_violations.clear()
            self._intervals.clear()
            self._previous = np.nan
            self._recent = None
        news = self._reader.read()
        if len(news.steps):
            self.written = file.stat().st_mtime
            seconds_S = np.diff(news.steps, prepend=self._previous) * news.over_steps(
                "step_seconds"
            )
            self._intervals += seconds_S[np.isfinite(seconds_S)].tolist()
            self._previous = float(news.steps[-1])
            self._recent = (
                news if self._recent is None else self._recent.followed_by(news, MOST_RECENT)
            )
            self.findings = findings(self._recent)
            self.info, self.step, self.load = news.info, int(news.steps[-1]), news.load(-1)
            self.max_violations += max_violation(news.counts_SME).mean(axis=1).tolist()
        elif must_exist:
            raise JobError(f"{file} holds no whole step yet: look again later")
        return bool(len(news.steps))


def _identity(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_dev, status.st_ino
