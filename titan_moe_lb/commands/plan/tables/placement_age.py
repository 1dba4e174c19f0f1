"""Slowdowns with a placement that was computed for an earlier load."""

from __future__ import annotations

from titan_moe_lb.commands.answer.answer import Column, Table
from titan_moe_lb.commands.answer.words import decimals
from titan_moe_lb.commands.plan.result import Plan


def table(plan: Plan) -> Table | None:
    """Build the table; None without a run."""
    if plan.run is None:
        return None
    return Table(
        title="How long a placement lasts",
        columns=(
            Column(title="EP"),
            Column(title="experts placed"),
            Column(title="last steps, placed for them", show=decimals(3)),
            Column(title="second half, placed for the first", show=decimals(3)),
            Column(title="last steps, placed for the first half", show=decimals(3)),
        ),
        groups=[
            [
                (
                    degree.ep_degree,
                    row.label,
                    row.last.step_slowdown,
                    row.stale_second_half.step_slowdown,
                    row.stale_last.step_slowdown,
                )
                for row in degree.measured
            ]
            for degree in plan.degrees
        ],
        text=[
            "Step time x balance, with experts placed for one load and used for the same or a later "
            "one."
        ],
    )
