"""Windows of a run's logged steps."""

from __future__ import annotations


def tenth(num_steps: int) -> int:
    """Length of the first and of the last tenth of the logged steps, at least 1."""
    return max(1, num_steps // 10)
