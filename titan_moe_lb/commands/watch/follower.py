"""Reader of the growing trace of a live run."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from titan_moe_lb.commands.diagnose.checks import findings
from titan_moe_lb.commands.diagnose.finding import Finding
from titan_moe_lb.errors import JobError
from titan_moe_lb.traces.balance_statistics import max_violation
from titan_moe_lb.traces.run_info import RunInfo
from titan_moe_lb.traces.step_load import StepLoad
from titan_moe_lb.traces.trace import Trace, TraceReader, trace_file

TIMES_LATE = 10
SECONDS_LATE = 60.0
"""A step is late beyond both bounds; checkpoints and compilation delay steps too."""
MOST_RECENT = 200
"""Logged steps in memory, enough to diagnose the end of a run."""
SPREAD = 40
"""Steps before them that the first look reads, evenly spread over the run."""


class Follower:
    """Last whole step of a growing trace, with recent history.

    All attributes but ``max_violations`` are unset until :meth:`look` has returned True.

    Attributes:
        info: description of the run.
        step: number of the last whole step.
        load: load of the last whole step.
        written: time when the trace last grew, in seconds of ``time.monotonic``.
        ended: True if the run has marked its end.
        findings: diagnosis of the recent steps; empty if they are too few.
        max_violations: each step that was read, and its MaxVio, mean over the layers.
    """

    info: RunInfo
    step: int
    load: StepLoad
    written: float
    ended: bool
    findings: list[Finding]

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._reader: TraceReader | None = None
        self._file: tuple[int, int] | None = None
        self._recent: Trace | None = None
        self.max_violations: dict[int, float] = {}

    @property
    def seconds_between_steps(self) -> float | None:
        """Median seconds between two recent logged steps; None if the trace has no times."""
        if self._recent is None:
            return None
        steps, seconds_S = self._recent.steps, self._recent.over_steps("step_seconds")
        intervals = np.diff(steps) * seconds_S[1:]
        known = intervals[np.isfinite(intervals)]
        return float(np.median(known)) if len(known) else None

    def age(self, now: float | None = None) -> float:
        """Seconds since the last step."""
        return max(0.0, (time.monotonic() if now is None else now) - self.written)

    def end(self, now: float | None = None) -> str | None:
        """Return a sentence about the end of the run: marked, or guessed from a step that is late."""
        if self.ended:
            return "the run has ended"
        usual, age = self.seconds_between_steps, self.age(now)
        if usual is None or age <= max(TIMES_LATE * usual, SECONDS_LATE):
            return None
        return (
            f"no step for {in_words(age)}, it was one every {in_words(usual)}: "
            "the run has ended or is dead"
        )

    def look(self, must_exist: bool = False) -> bool:
        """Read the steps since the last call; the first time, those that the view needs.

        Returns:
            True if there was a new step.

        Raises:
            JobError: the file is no trace; or see ``must_exist``.
        """
        file = trace_file(self._run_dir)
        if not must_exist and not file.exists():
            return False
        if self._reader is None or self._file != _identity(file) or self._reader.is_shortened():
            # First call, or a resumed run has shortened or replaced the file.
            self._recent = None
            self.max_violations = _max_violations(TraceReader(self._run_dir).read(SPREAD))
            self._reader, self._file = TraceReader(self._run_dir), _identity(file)
            self._reader.skip_to_last(MOST_RECENT)
        news = self._reader.read()
        self.ended = news.ended
        if len(news.steps):
            # The clock may be set while the run is watched.
            self.written = time.monotonic() - max(0.0, time.time() - file.stat().st_mtime)
            self._recent = (
                news if self._recent is None else self._recent.followed_by(news, MOST_RECENT)
            )
            self.findings = findings(self._recent)
            self.info, self.step, self.load = news.info, int(news.steps[-1]), news.load(-1)
            self.max_violations |= _max_violations(news)
        elif must_exist:
            raise JobError(f"{file} holds no whole step yet: look again later")
        return bool(len(news.steps))


def in_words(seconds: float) -> str:
    """Format a duration in its largest unit."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


def _max_violations(trace: Trace) -> dict[int, float]:
    violation_S = max_violation(trace.counts_SME).mean(axis=1)
    return dict(zip(trace.steps.tolist(), violation_S.tolist(), strict=True))


def _identity(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_dev, status.st_ino
