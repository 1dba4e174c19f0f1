"""What to do, before any table: the degree, the head-room, what balancing and placing would buy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from titan_moe_lb.costmodel.times.job import JobModel
from titan_moe_lb.costmodel.times.predict import DegreePlan, MeasuredRow, Outcome

CLOSE = 0.1
"""Degrees whose steps differ by less are too close for this model to rank."""


@dataclass(frozen=True, kw_only=True)
class Gain:
    """What a change would buy at the chosen degree."""

    by: str
    share: float
    """Of the step's time."""
    gpu_hours: float
    """Over all steps of the job."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What to do with the job."""

    load: str
    """The load that it is judged under."""
    ep_degree: int | None
    """The fastest degree that fits; None where none does."""
    outcome: Outcome | None
    """At that degree."""
    head_room_bytes: float
    largest_imbalance_that_fits: float | None
    gpu_hours: float
    """Of all steps of the job."""
    balancing: Gain | None
    placements: tuple[Gain, ...]
    """Placed for the first half of the run, judged at its end."""
    next_degree: int | None
    """The next fastest that fits."""
    next_slower: float
    """By how much its step is slower."""

    @property
    def is_close(self) -> bool:
        return self.next_degree is not None and self.next_slower < CLOSE


def judge(job: JobModel, degrees: Sequence[DegreePlan], usable_bytes: float) -> Verdict:
    """Under the load of the run where there is one, else log-normal loads, else at balance.

    At balance there is nothing to gain; there the gain is that at the largest imbalance
    asked for that is not the worst case.
    """
    load, outcome_of = _load(degrees)
    fitting = sorted(
        (degree for degree in degrees if outcome_of(degree).fits),
        key=lambda degree: outcome_of(degree).step_seconds,
    )
    if not fitting:
        return Verdict(
            load=load,
            ep_degree=None,
            outcome=None,
            head_room_bytes=0.0,
            largest_imbalance_that_fits=None,
            gpu_hours=0.0,
            balancing=None,
            placements=(),
            next_degree=None,
            next_slower=0.0,
        )
    best, *others = fitting
    outcome = outcome_of(best)

    def hours(seconds: float) -> float:
        return seconds * job.steps * job.num_ranks / 3600

    def gain(by: str, before: Outcome, after: Outcome) -> Gain:
        saved = before.step_seconds - after.step_seconds
        return Gain(by=by, share=saved / before.step_seconds, gpu_hours=hours(saved))

    below_worst = [row for row in best.rows if 1 < row.imbalance_factor < _worst(best)]
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
            gain(placed(row), outcome, row.stale_last)
            for row in best.measured
            if row.placement != "contiguous"
        ),
        next_degree=others[0].ep_degree if others else None,
        next_slower=outcome_of(others[0]).step_seconds / outcome.step_seconds - 1
        if others
        else 0.0,
    )


def placed(row: MeasuredRow) -> str:
    """What the tables call a placement."""
    return row.placement + (f" +{row.redundant_experts}" if row.redundant_experts else "")


def _worst(degree: DegreePlan) -> float:
    return degree.curve[-1].imbalance_factor


def _load(degrees: Sequence[DegreePlan]) -> tuple[str, Callable[[DegreePlan], Outcome]]:
    if degrees[0].measured:
        return "the load of the run's last steps", lambda degree: degree.measured[0].last
    if degrees[0].lognormal:
        return degrees[0].lognormal[0].said, lambda degree: degree.lognormal[0].outcome
    return "balance", lambda degree: degree.balance
