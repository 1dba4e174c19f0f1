"""Verdict of a plan: best degree, free memory, and savings by balancing and placement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from titan_moe_lb.costmodel.times.job import JobModel
from titan_moe_lb.costmodel.times.outcome import Outcome
from titan_moe_lb.costmodel.times.predict import DegreePlan

CLOSE = 0.1
"""Relative difference of step times below which this model cannot rank two degrees."""


@dataclass(frozen=True, kw_only=True)
class Gain:
    """Saving by one change at the chosen degree."""

    by: str
    share: float
    """Saved share of the step time."""
    gpu_hours: float
    """Saved GPU-hours over all steps of the job."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Advice for the job."""

    load: str
    """Load under which the degrees are compared, as a phrase."""
    ep_degree: int
    """Fastest degree that fits; the fastest of all if no degree fits."""
    fits: bool
    outcome: Outcome
    """Outcome at that degree."""
    balance: Outcome
    """Outcome at that degree if all loads were even."""
    head_room_bytes: float
    """Free memory; negative if the degree does not fit."""
    largest_imbalance_that_fits: float | None
    fits_any_imbalance: bool
    gpu_hours: float
    """GPU-hours of all steps of the job."""
    balancing: Gain | None
    placements: tuple[Gain, ...]
    """Savings in the run's last steps of placements computed for its first half."""
    next_degree: int | None
    """Second fastest degree that fits; if no degree fits, the second fastest of all."""
    next_slower: float
    """Step time of ``next_degree`` over the fastest one, minus 1."""

    @property
    def is_close(self) -> bool:
        """True if the two fastest degrees are too close to rank."""
        return self.next_degree is not None and self.next_slower < CLOSE


def judge(job: JobModel, degrees: Sequence[DegreePlan], usable_bytes: float) -> Verdict:
    """Compare the degrees under the run's load, else log-normal loads, else balance.

    At balance there is nothing to save. The verdict then reports the saving at the largest
    requested imbalance below the worst case.
    """
    load, outcome_of = _load(degrees)
    by_time = sorted(degrees, key=lambda degree: outcome_of(degree).step_seconds)
    fitting = [degree for degree in by_time if outcome_of(degree).fits]
    best, *others = fitting or by_time
    outcome = outcome_of(best)

    def hours(seconds: float) -> float:
        return seconds * job.steps * job.num_ranks / 3600

    def gain(by: str, before: Outcome, after: Outcome) -> Gain:
        saved = before.step_seconds - after.step_seconds
        return Gain(by=by, share=saved / before.step_seconds, gpu_hours=hours(saved))

    worst = best.curve[-1].imbalance_factor
    below_worst = [row for row in best.rows if 1 < row.imbalance_factor < worst]
    balancing = None
    if best.measured or best.lognormal:
        balancing = gain("balance", outcome, best.balance)
    elif below_worst:
        row = max(below_worst, key=lambda row: row.imbalance_factor)
        by = f"balance, at an imbalance of {row.imbalance_factor:.2f},"
        balancing = gain(by, row.outcome, best.balance)
    return Verdict(
        load=load,
        ep_degree=best.ep_degree,
        fits=bool(fitting),
        outcome=outcome,
        balance=best.balance,
        head_room_bytes=usable_bytes - outcome.memory_bytes,
        largest_imbalance_that_fits=best.largest_imbalance_that_fits,
        fits_any_imbalance=best.fits_any_imbalance,
        gpu_hours=hours(outcome.step_seconds),
        balancing=balancing,
        placements=tuple(
            gain(row.label, outcome, row.stale_last)
            for row in best.measured
            if row.placement != "contiguous"
        ),
        next_degree=others[0].ep_degree if others else None,
        next_slower=outcome_of((others or [best])[0]).step_seconds / outcome.step_seconds - 1,
    )


def _load(degrees: Sequence[DegreePlan]) -> tuple[str, Callable[[DegreePlan], Outcome]]:
    if degrees[0].measured:
        return "the load of the run's last steps", lambda degree: degree.measured[0].last
    if degrees[0].lognormal:
        return degrees[0].lognormal[0].description, lambda degree: degree.lognormal[0].outcome
    return "balance", lambda degree: degree.balance
