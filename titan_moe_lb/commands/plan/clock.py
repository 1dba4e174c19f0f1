"""Measured time of a step, split by the plan into balance, imbalance and the rest."""

from __future__ import annotations

from dataclasses import dataclass

from titan_moe_lb.commands.plan.published_error import ADDED_TIME
from titan_moe_lb.commands.plan.verdict import Verdict

FOREIGN = 0.75
"""Unexplained share above which the time is probably that of another device."""


TOO_SHORT = -0.5
"""Unexplained share below which the planned job is not the one that was timed."""


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Measured step beside the predicted one. The three parts add up to the measured time."""

    measured_seconds: float
    ep_degree: int
    load: str
    """Load of the prediction, as a phrase."""
    balance_seconds: float
    """Predicted step at balance."""
    imbalance_seconds: float
    """Predicted time that the load adds to it."""
    imbalance_seconds_range: tuple[float, float]
    """The same, within the error of published runs."""
    unexplained_seconds: float
    """The rest of the measured time; negative if the prediction is longer."""
    unexplained_share: float
    """``unexplained_seconds`` over the measured time."""

    @classmethod
    def of(cls, measured_seconds: float, verdict: Verdict) -> Clock:
        """Split a measured step by the outcome of one expert-parallel degree."""
        predicted, balance = verdict.outcome.step_seconds, verdict.balance.step_seconds
        added = predicted - balance
        least, most = ADDED_TIME
        unexplained = measured_seconds - predicted
        return cls(
            measured_seconds=measured_seconds,
            ep_degree=verdict.ep_degree,
            load=verdict.load,
            balance_seconds=balance,
            imbalance_seconds=added,
            imbalance_seconds_range=(added / most, added / least),
            unexplained_seconds=unexplained,
            unexplained_share=unexplained / measured_seconds,
        )

    @property
    def is_foreign(self) -> bool:
        """True if the time is probably not that of the planned device."""
        return self.unexplained_share > FOREIGN

    @property
    def is_too_short(self) -> bool:
        """True if the planned step is far longer than the measured one."""
        return self.unexplained_share < TOO_SHORT
