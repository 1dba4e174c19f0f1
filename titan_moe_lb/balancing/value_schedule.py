"""A value that changes at given steps or tokens of training: a loss weight, a bias speed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from titan_moe_lb.errors import JobError


@dataclass(kw_only=True, slots=True)
class Change:
    """From when on a value is another."""

    value: float
    """The value from then on; 0 switches it off."""

    step: int | None = None
    """The first optimizer step that has it; or ``tokens``."""

    tokens: float | None = None
    """The tokens of training after which the next step has it, as in 14.3e12."""


def value_at(start: float, changes: Sequence[Change], step: int, tokens: int) -> float:
    """The value of a step.

    Args:
        start: the value before the first change.
        changes: in order; see :func:`check_changes`.
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
    """Whether a loss or the bias rule of a router's Config changes after a number of tokens."""
    components = (*router.aux_losses, router.expert_bias)
    changes = [change for component in components if component for change in component.changes]
    return any(change.tokens is not None for change in changes)


def check_changes(what: str, changes: Sequence[Change]) -> None:
    """Raises ``JobError``: a change without a time or with two, a negative value, a time that
    goes backwards, steps and tokens mixed."""
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
            raise JobError(f"{what} changes: say when either in steps or in tokens, not in both")
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
