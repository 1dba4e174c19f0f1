"""Age of the last step, and a warning if the run seems to have ended."""

from __future__ import annotations

import time

from titan_moe_lb.commands.watch.follower import Follower

TIMES_LATE = 10
SECONDS_LATE = 60.0
"""A step is late beyond both bounds; checkpoints and compilation delay steps too."""


def age(follower: Follower, now: float | None = None) -> str:
    """Format the age of the last step."""
    return f"{_duration(_seconds(follower, now))} ago"


def verdict(follower: Follower, now: float | None = None) -> str | None:
    """Return a sentence about the end of the run: marked, or guessed from a step that is late."""
    if follower.ended:
        return "the run has ended"
    usual, seconds = follower.seconds_between_steps, _seconds(follower, now)
    if usual is None or seconds <= max(TIMES_LATE * usual, SECONDS_LATE):
        return None
    return (
        f"no step for {_duration(seconds)}, it was one every {_duration(usual)}: "
        "the run has ended or is dead"
    )


def _seconds(follower: Follower, now: float | None) -> float:
    return max(0.0, (time.monotonic() if now is None else now) - follower.written)


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
