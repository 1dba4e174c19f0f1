"""The charts of a plan's page, as plotly figures."""

from __future__ import annotations

from collections.abc import Callable

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from titan_moe_lb.costmodel.plan import Outcome
from titan_moe_lb.pages.charts import Chart, blank_figure
from titan_moe_lb.plan.plan import Plan

GIB = 2**30


def charts(plan: Plan) -> list[Chart]:
    """Slowdown, memory and the parts of a layer; what was measured where there is a run."""
    made = [
        Chart(
            "Step time against imbalance",
            "One optimizer step relative to balance, for each expert-parallel degree. The "
            "imbalance is the load of the most loaded expert over the mean.",
            [_over_imbalance(plan, lambda outcome: outcome.step_slowdown, "step, × balance")],
        ),
        Chart(
            "Memory against imbalance",
            "The rank that needs most: parameters, gradients, optimizer, what FSDP gathers, and "
            "activations at their peak. The dashed line is the usable memory.",
            [_memory(plan)],
        ),
        Chart(
            "Where the time of an MoE layer goes",
            "Forward pass of one micro-batch on the busiest rank.",
            [_parts(plan)],
        ),
    ]
    if plan.run:
        made.append(
            Chart(
                "What the run's own load costs",
                "Step time relative to balance at the first and at the last steps of the run, "
                "with experts placed in blocks and placed greedily for the last steps' load.",
                [_measured(plan)],
            )
        )
    return made


def _over_imbalance(plan: Plan, value: Callable[[Outcome], float], title: str) -> go.Figure:
    figure = blank_figure()
    colors = sample_colorscale("Viridis", len(plan.degrees) + 1)
    for degree, color in zip(plan.degrees, colors, strict=False):
        figure.add_scatter(
            x=[row.imbalance_factor for row in degree.curve],
            y=[value(row.outcome) for row in degree.curve],
            name=f"EP {degree.ep_degree}",
            line={"color": color},
        )
    figure.update_xaxes(title="imbalance", type="log")
    figure.update_yaxes(title=title)
    return figure


def _memory(plan: Plan) -> go.Figure:
    figure = _over_imbalance(plan, lambda outcome: outcome.memory_bytes / GIB, "GiB")
    figure.add_hline(y=plan.usable_bytes / GIB, line={"dash": "dash", "color": "#b3261e"})
    return figure


def _parts(plan: Plan) -> go.Figure:
    figure = blank_figure()
    rows = [
        (f"EP {degree.ep_degree}, × {row.imbalance_factor:.3g}", row.outcome)
        for degree in plan.degrees
        for row in degree.rows
    ]
    for name, color in (("compute", "#2a5d9f"), ("dispatch", "#d9822b"), ("combine", "#7a7f87")):
        figure.add_bar(
            x=[label for label, _outcome in rows],
            y=[getattr(outcome, f"{name}_seconds") * 1e3 for _label, outcome in rows],
            name=name,
            marker_color=color,
        )
    figure.update_layout(barmode="stack")
    figure.update_xaxes(title="")
    figure.update_yaxes(title="ms")
    return figure


def _measured(plan: Plan) -> go.Figure:
    figure = blank_figure()
    for placement, when, color in (
        ("contiguous", "first", "#8f1020"),
        ("contiguous", "last", "#e8825b"),
        ("greedy", "last", "#3d7d5a"),
    ):
        rows = [
            (f"EP {degree.ep_degree}", getattr(row, when).step_slowdown)
            for degree in plan.degrees
            for row in degree.measured
            if row.placement == placement
        ]
        figure.add_bar(
            x=[label for label, _slowdown in rows],
            y=[slowdown for _label, slowdown in rows],
            name=f"{placement}, {when} steps",
            marker_color=color,
        )
    figure.update_xaxes(title="")
    figure.update_yaxes(title="step, × balance")
    return figure
