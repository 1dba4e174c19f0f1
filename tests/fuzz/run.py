"""Pass many damaged files to their readers."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings

from tests.fuzz.guard import Guard
from tests.fuzz.targets import TARGETS, empty
from titan_moe_lb.errors import JobError

SECONDS = 30.0
"""Time limit of a case, in seconds, long enough for a busy machine."""
_guard = Guard()


@dataclass
class Outcome:
    """Outcomes of all cases of one target."""

    target: str
    cases: int = 0
    refused: int = 0
    slowest_seconds: float = 0.0
    lines: Counter[str] = field(default_factory=Counter)
    """First words of the refusals, which show that the damage is of many kinds."""

    def __str__(self) -> str:
        return (
            f"{self.target:10} {self.cases:6} cases, {self.refused:6} refused in one line "
            f"({len(self.lines)} kinds), slowest {self.slowest_seconds:.2f} s"
        )


def fuzz(target: str, cases: int, number: int) -> Outcome:
    """Run one target.

    Args:
        number: seed.

    Raises:
        Exception: what a reader raised besides ``JobError``.
    """
    outcome = Outcome(target)
    kind = TARGETS[target]
    strategy = kind.cases()

    @seed(number)
    @settings(
        max_examples=cases,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        # A case is a file: the traceback says more, and the seed finds it again.
        phases=[Phase.generate],
        verbosity=Verbosity.quiet,
    )
    @given(case=strategy)
    def run(case: Any) -> None:
        empty(folder)
        begun = time.monotonic()
        outcome.cases += 1
        with _guard.watch(folder, seconds=SECONDS, may_unpickle=kind.is_pickle):
            try:
                kind.read(case, folder)
            except JobError as error:
                line = str(error)
                assert "\n" not in line and "\r" not in line, f"not one line: {line!r}"
                outcome.refused += 1
                outcome.lines[" ".join(w for w in line.split() if w.isalpha())[:60]] += 1
        outcome.slowest_seconds = max(outcome.slowest_seconds, time.monotonic() - begun)

    with TemporaryDirectory(prefix="titan_moe_lb-fuzz-") as name:
        folder = Path(name)
        run()
    return outcome
