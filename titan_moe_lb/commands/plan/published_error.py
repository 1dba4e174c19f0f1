"""Errors of the plan against published runs (docs/evidence/published_runs.md)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Error:
    """Predicted over measured, minus 1, in percent."""

    rows: int
    median: int
    least: int
    most: int

    def __str__(self) -> str:
        return f"{self.median:+d} % in the median ({self.least:+d} to {self.most:+d} %, {self.rows} runs)"


SLOW_DOWNS = Error(15, -7, -15, 18)
"""Step time over balance at a measured imbalance."""
STEP_TIMES = {"H100": Error(7, -8, -21, -1), "B200": Error(7, -33, -79, -24)}
"""Step time in seconds, by the device's name; at balance."""
ADDED_TIME = (0.68, 1.40)
"""Least and largest predicted time that imbalance adds, over the measured one, without balancing."""


def of_step_times(device: str) -> str:
    """Describe the error of step times on a device."""
    for name, error in STEP_TIMES.items():
        if name in device:
            return f"step times on {name} deviate by {error}"
    return "no published run on this device was compared"
