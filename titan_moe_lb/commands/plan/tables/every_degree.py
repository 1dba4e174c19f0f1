"""Outcomes of every expert-parallel degree under every assumed load."""

from __future__ import annotations

from titan_moe_lb.commands.answer.answer import Column, Table
from titan_moe_lb.commands.answer.words import duration
from titan_moe_lb.commands.plan.result import Plan
from titan_moe_lb.commands.plan.tables import outcome
from titan_moe_lb.costmodel.times.predict import DegreePlan


def table(plan: Plan) -> Table:
    """Build the table."""
    return Table(
        title="Every degree and imbalance",
        columns=(Column(title="EP"), Column(title="imbalance"), *outcome.COLUMNS),
        groups=[
            [
                *(
                    (degree.ep_degree, f"{row.imbalance_factor:.2f}", *outcome.row(row.outcome))
                    for row in degree.rows
                ),
                *(
                    (degree.ep_degree, row.name, *outcome.row(row.outcome))
                    for row in degree.lognormal
                ),
            ]
            for degree in plan.degrees
        ],
        text=[outcome.MEANING],
        notes=[_fastest(plan), *map(_fits_up_to, plan.degrees)],
    )


def _fastest(plan: Plan) -> str:
    """Name the degree with the shortest step at the smallest and at the largest imbalance.

    The slowdowns cannot rank degrees, because each compares with balance at its own degree.
    """
    found = []
    rows = list(zip(*(degree.rows for degree in plan.degrees), strict=True))
    for row in sorted({0, len(rows) - 1}, key=lambda row: rows[row][0].imbalance_factor):
        imbalance = f"imbalance {rows[row][0].imbalance_factor:.2f}"
        fitting = [
            (one.outcome.step_seconds, degree.ep_degree)
            for degree, one in zip(plan.degrees, rows[row], strict=True)
            if one.outcome.fits
        ]
        if fitting:
            seconds, ep_degree = min(fitting)
            found.append(f"EP {ep_degree} at {imbalance} ({duration(seconds)} a step)")
        else:
            found.append(f"none fits at {imbalance}")
    return f"Fastest that fits: {', '.join(found)}. Each x is relative to balance at its own EP."


def _fits_up_to(degree: DegreePlan) -> str:
    largest = degree.largest_imbalance_that_fits
    tokens = f"{degree.balance.busiest_rank_tokens:,.0f}"
    if largest is None:
        room = "does not fit even at balance"
    elif degree.fits_any_imbalance:
        room = "fits at any imbalance"
    else:
        room = f"fits up to imbalance {largest:.2f}"
    return (
        f"EP {degree.ep_degree}: {room}. At balance a rank receives {tokens} copies of tokens in a "
        "micro-batch."
    )
