"""One thing that is wrong with a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum


class Severity(IntEnum):
    """Severity of a finding."""

    NOTE = 0
    """It costs something, and may be meant."""
    WARNING = 1
    """Worth a change before the next run."""
    FAULT = 2
    """The run is not worth going on with as it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """In plain words, each one sentence or two."""

    kind: str = ""
    """One word for scripts, as in ``dead_experts``: the name of the check, which fills it in."""
    severity: Severity = Severity.WARNING
    what: str
    """The fault, and its layers."""
    evidence: str
    """The numbers that show it."""
    reason: str
    """The bound that they cross, and the reason for it."""
    remedy: str
    """The change to make."""
    toml: str = ""
    """The lines of the job to try, if there are any."""
    layers: tuple[int, ...] | None = None
    """Numbers of the layers in the whole model; None for the run as a whole."""
    experts: tuple[tuple[int, int], ...] = ()
    """Layer and expert of each that is concerned, the fullest first."""
    since: int | None = None
    """First logged step of it; None if unknown."""
    explains: dict[str, str] = field(default_factory=dict)
    """The findings that follow from it and are not listed: kind to ``what``."""
