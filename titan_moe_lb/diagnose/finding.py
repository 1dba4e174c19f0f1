"""One thing that is wrong with a run."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Severity(IntEnum):
    """How bad it is."""

    NOTE = 0
    """It costs something, and may be meant."""
    WARNING = 1
    """Worth a change before the next run."""
    FAULT = 2
    """The run is not worth going on with as it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """In plain words, each one sentence or two."""

    kind: str
    """One word for scripts, as in ``dead_experts``."""

    severity: Severity

    what: str
    """What is wrong, and where."""

    evidence: str
    """The numbers that show it."""

    reason: str
    """The bound that they cross, and why it stands there."""

    remedy: str
    """What to do."""

    toml: str = ""
    """The lines of the job to try, if there are any."""
