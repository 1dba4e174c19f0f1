"""Finding of a diagnosis."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum


class Severity(IntEnum):
    """Severity of a finding."""

    NOTE = 0
    """It has a cost, but may be intended."""
    WARNING = 1
    """Change it before the next run."""
    FAULT = 2
    """Do not continue the run without a change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One fault of a run, with evidence and a remedy. Texts have one or two sentences."""

    kind: str = ""
    """Name of the check, for scripts, such as ``dead_experts``. :func:`diagnosis` fills it in."""
    severity: Severity = Severity.WARNING
    what: str
    """Fault, with its layers."""
    evidence: str
    """Numbers that show the fault."""
    reason: str
    """Bound that the numbers exceed, and the reason for it."""
    remedy: str
    """Change to make."""
    toml: str = ""
    """Lines to try in the job file; may be empty."""
    layers: tuple[int, ...] | None = None
    """Numbers of the layers in the whole model; None for the run as a whole."""
    experts: tuple[tuple[int, int], ...] = ()
    """Layer and number of each affected expert, the fullest first."""
    since: int | None = None
    """First logged step with the fault; None if unknown."""
    explains: dict[str, str] = field(default_factory=dict)
    """Kind to ``what`` of each finding that follows from this one and is not listed itself."""
