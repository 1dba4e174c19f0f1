"""Tables about the load of a recorded run."""

from __future__ import annotations

from titan_moe_lb.commands.answer.answer import Column, Table
from titan_moe_lb.commands.answer.words import decimals, duration
from titan_moe_lb.commands.plan.result import Plan
from titan_moe_lb.commands.plan.tables import outcome
from titan_moe_lb.costmodel.times.predict import DegreePlan


def measured_load(plan: Plan) -> Table | None:
    """Outcomes under the load of the run, with every placement; None without a run."""
    if plan.run is None:
        return None
    run = plan.run
    losses = ", ".join(
        f"{name.replace('_', ' ')} {weight:g}" for name, weight in run["losses"].items()
    )
    balancing = f"aux losses: {losses or 'none'}; expert bias: {run['expert_bias'] or 'off'}"
    if run["is_foreign"]:
        balancing = "its balancing is not known"
    if run["forced_routing"]:
        balancing = f"FORCED ROUTING {run['forced_routing']}"
    peak = ""
    if run["max_overload_factor"] is not None:
        peak = (
            f"In single micro-batches, its busiest rank at EP {run['ep_degree']} got up to "
            f"{run['max_overload_factor']:.2f} x the balanced tokens. "
        )
    layers = ""
    if run["num_layers"] != run["num_planned_layers"]:
        layers = (
            f"Its {run['num_layers']} MoE layers stand for the job's {run['num_planned_layers']}, "
            "in equal parts of the depth. "
        )
    return Table(
        title="Measured load",
        columns=(
            Column(title="EP"),
            Column(title="experts placed"),
            Column(title="steps"),
            *outcome.COLUMNS,
        ),
        groups=[
            [
                (degree.ep_degree, row.label, steps, *outcome.row(getattr(row, steps)))
                for row in degree.measured
                for steps in ("first", "last")
            ]
            for degree in plan.degrees
        ],
        text=[
            f"Run: {run['path']} ({run['layout']}; {balancing}). {layers}First steps: "
            f"{_span(run['first_steps'])}; last steps: {_span(run['last_steps'])}"
            f"{', evenly spread ones' * run['is_sample']}. {peak}The loads of the last steps are "
            f"about log-normal with sigma {run['sigma']:.2f}."
        ],
        notes=[*map(_savings, plan.degrees)],
    )


def placement_age(plan: Plan) -> Table | None:
    """Slowdowns with a placement for an earlier load; None without a run."""
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


def _savings(degree: DegreePlan) -> str:
    contiguous, greedy, *_with_copies = degree.measured
    first, last, moved = (
        f"{one.step_slowdown:.2f} x balance ({duration(one.step_seconds)})"
        for one in (contiguous.first, contiguous.last, greedy.last)
    )
    return (
        f"EP {degree.ep_degree}: first steps {first}, last steps {last}, "
        f"last steps with experts placed greedily {moved}."
    )


def _span(steps: list[int]) -> str:
    return f"{steps[0]} alone" if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"
