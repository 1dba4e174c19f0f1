"""The verdict: the best degree, its head-room, and what balancing and placing would save."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from titan_moe_lb.costmodel.times.job import JobModel
from titan_moe_lb.costmodel.times.outcome import Outcome
from titan_moe_lb.costmodel.times.predict import DegreePlan

CLOSE = 0.1
"""Degrees whose steps differ by less are too close for this model to rank."""


@dataclass(frozen=True, kw_only=True)
class Gain:
    """Saving of a change at the chosen degree."""

    by: str
    share: float
    """Share of the step's time."""
    gpu_hours: float
    """Over all steps of the job."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Advice for the job."""

    load: str
    """The load under which degrees are compared."""
    ep_degree: int | None = None
    """The fastest degree that fits; None where none does."""
    outcome: Outcome | None = None
    """At that degree."""
    head_room_bytes: float = 0.0
    largest_imbalance_that_fits: float | None = None
    gpu_hours: float = 0.0
    """GPU-hours of all steps of the job."""
    balancing: Gain | None = None
    placements: tuple[Gain, ...] = ()
    """Placed for the first half of the run, judged at its end."""
    next_degree: int | None = None
    """The next fastest that fits."""
    next_slower: float = 0.0
    """Relative difference of its step time."""

    @property
    def is_close(self) -> bool:
        return self.next_degree is not None and self.next_slower < CLOSE


def judge(job: JobModel, degrees: Sequence[DegreePlan], usable_bytes: float) -> Verdict:
    """Compare the degrees under the run's load, else log-normal loads, else at balance.

    Balance leaves nothing to save. There the saving is that at the largest imbalance asked for
    below the worst case.
    """
    load, outcome_of = _load(degrees)
    fitting = sorted(
        (degree for degree in degrees if outcome_of(degree).fits),
        key=lambda degree: outcome_of(degree).step_seconds,
    )
    if not fitting:
        return Verdict(load=load)
    best, *others = fitting
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
        by = f"balance, where the imbalance would be {row.imbalance_factor:.2f},"
        balancing = gain(by, row.outcome, best.balance)
    return Verdict(
        load=load,
        ep_degree=best.ep_degree,
        outcome=outcome,
        head_room_bytes=usable_bytes - outcome.memory_bytes,
        largest_imbalance_that_fits=best.largest_imbalance_that_fits,
        gpu_hours=hours(outcome.step_seconds),
        balancing=balancing,
        placements=tuple(
            gain(row.label, outcome, row.stale_last)
            for row in best.measured
            if row.placement != "contiguous"
        ),
        next_degree=others[0].ep_degree if others else None,
        next_slower=outcome_of((others or fitting)[0]).step_seconds / outcome.step_seconds - 1,
    )


def _load(degrees: Sequence[DegreePlan]) -> tuple[str, Callable[[DegreePlan], Outcome]]:
    if degrees[0].measured:
        return "the load of the run's last steps", lambda degree: degree.measured[0].last
    if degrees[0].lognormal:
        return degrees[0].lognormal[0].description, lambda degree: degree.lognormal[0].outcome
    return "balance", lambda degree: degree.balance
