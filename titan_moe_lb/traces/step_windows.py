"""Windows of a run's logged steps."""

from __future__ import annotations


def tenth(num_steps: int) -> int:
    """Return the length of a tenth of the logged steps, at least 1."""
    return max(1, num_steps // 10)
