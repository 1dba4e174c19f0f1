"""Schedule of a value, such as a loss weight or a bias speed, by steps or tokens of training."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from titan_moe_lb.errors import JobError


@dataclass(kw_only=True, slots=True)
class Change:
    """Change of a value at a step or after a number of tokens, at once or gradually."""

    value: float
    """The value from then on, or from ``until`` on; 0 switches it off."""

    step: int | None = None
    """First optimizer step with this value, or last one with the old value before ``until``."""

    tokens: float | None = None
    """Tokens of training, as in 14.3e12, instead of ``step``."""

    shape: Literal["jump", "linear", "cosine"] = "jump"
    """Path to the value: at once; along a line; or along half a period of a cosine."""

    until: float | None = None
    """First step, or tokens, with the new value at the end of a line or cosine."""

    def __str__(self) -> str:
        unit = "step" if self.tokens is None else "token"
        if self.until is None:
            return f"{self.value:g} from {unit} {self.begin:g}"
        return f"{self.shape} to {self.value:g} from {unit} {self.begin:g} to {self.until:g}"

    @property
    def begin(self) -> float:
        """Step or tokens at which the change begins."""
        begin = self.step if self.tokens is None else self.tokens
        assert begin is not None
        return begin

    @property
    def end(self) -> float:
        """Step or tokens at which the value is reached."""
        return self.begin if self.until is None else self.until

    def apply(self, value: float, now: float) -> float:
        """Return the value at ``now``."""
        if now < self.begin:
            return value
        if now >= self.end:
            return self.value
        part = (now - self.begin) / (self.end - self.begin)
        if self.shape == "cosine":
            part = (1 - math.cos(math.pi * part)) / 2
        return value + part * (self.value - value)


def value_at(start: float, changes: Sequence[Change], step: int, tokens: int) -> float:
    """Return the value in a step.

    ``step`` counts from 1. ``tokens`` are those of the global batches of all steps before it.
    """
    value = start
    for change in changes:
        value = change.apply(value, tokens if change.step is None else step)
    return float(value)  # TOML's 0 is an integer, with which a rule would compute in integers


def changes_after_tokens(router) -> bool:
    """Return True if a loss or the bias rule changes after a number of tokens."""
    components = (*router.aux_losses, router.expert_bias)
    changes = [change for component in components if component for change in component.changes]
    return any(change.tokens is not None for change in changes)


def check_changes(what: str, changes: Sequence[Change]) -> None:
    """Check that changes are valid and in order."""
    for change in changes:
        if not isinstance(change, Change):
            raise JobError(
                f"{what} changes: {change!r} is no Change: write Change(step=..., value=...)"
            )
        if (change.step is None) == (change.tokens is None):
            raise JobError(f"{what} changes: each needs either step or tokens, to say when")
        if not (math.isfinite(change.value) and change.value >= 0):
            raise JobError(
                f"{what} changes: value {change.value} must be a finite number of at least 0"
            )
        if change.shape not in (("jump",) if change.until is None else ("linear", "cosine")):
            raise JobError(
                f'{what} changes: shape "{change.shape}" and until {change.until} do not fit: '
                'set both shape = "linear" or "cosine" and until, or neither'
            )
        if change.until is not None and not change.begin < change.until < math.inf:
            raise JobError(
                f"{what} changes: until {change.until:g} does not come after the beginning of the "
                f"change, {change.begin:g}"
            )
    if len({change.step is None for change in changes}) > 1:
        raise JobError(f"{what} changes: use either step or tokens for all of them, not both")
    for earlier, later in itertools.pairwise(changes):
        if later.begin <= earlier.begin or later.begin < earlier.end:
            raise JobError(
                f'{what} changes: "{later}" does not come after "{earlier}": put them in order, '
                "without overlap"
            )
    if changes and changes[0].begin < 1:
        raise JobError(f'{what} changes: "{changes[0]}" is before training begins')
