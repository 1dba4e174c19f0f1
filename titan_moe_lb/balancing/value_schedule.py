"""Schedule of a value, such as a loss weight or a bias speed, by steps or tokens of training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from titan_moe_lb.errors import JobError


@dataclass(kw_only=True, slots=True)
class Change:
    """Change of a value at a step or after a number of tokens."""

    value: float
    """The value from then on; 0 switches it off."""

    step: int | None = None
    """The first optimizer step with this value; or ``tokens``."""

    tokens: float | None = None
    """The tokens of training after which the next step has this value, as in 14.3e12."""


def value_at(start: float, changes: Sequence[Change], step: int, tokens: int) -> float:
    """Return the value in a step.

    Args:
        start: value before the first change.
        changes: changes in order; see :func:`check_changes`.
        step: number of the optimizer step, from 1.
        tokens: tokens of the global batches of all steps before it.
    """
    value = start
    for change in changes:
        if change.step is not None and step >= change.step:
            value = change.value
        if change.tokens is not None and tokens >= change.tokens:
            value = change.value
    return value


def changes_after_tokens(router) -> bool:
    """Return True if a loss or the bias rule changes after a number of tokens.

    Args:
        router: a ``LoadBalancedRouter.Config``.
    """
    components = (*router.aux_losses, router.expert_bias)
    changes = [change for component in components if component for change in component.changes]
    return any(change.tokens is not None for change in changes)


def check_changes(what: str, changes: Sequence[Change]) -> None:
    """Check that changes are valid and in order.

    Raises:
        JobError: a change has no time or two, or its value is negative or not finite. The times
            are not ascending, begin before training, or mix steps and tokens.
    """
    for change in changes:
        if (change.step is None) == (change.tokens is None):
            raise JobError(f"{what} changes: each needs either step or tokens, to say when")
        if not (math.isfinite(change.value) and change.value >= 0):
            raise JobError(
                f"{what} changes: value {change.value} must be a finite number of at least 0"
            )
    for unit in ("step", "tokens"):
        times = [getattr(change, unit) for change in changes]
        if any(time is None for time in times) and any(time is not None for time in times):
            raise JobError(f"{what} changes: use either step or tokens for all of them, not both")
        if None in times:
            continue
        for earlier, later in zip(times, times[1:], strict=False):
            if later <= earlier:
                raise JobError(
                    f"{what} changes: {unit} {later:g} does not come after {earlier:g}; "
                    "put the changes in order"
                )
        if times and times[0] < 1:
            raise JobError(f"{what} changes: {unit} {times[0]:g} is before training begins")
