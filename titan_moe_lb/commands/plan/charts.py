"""The charts of a plan's page, as plotly figures."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import plotly.graph_objects as go

from titan_moe_lb.commands.plan.result import Plan
from titan_moe_lb.commands.plan.sentences import GIB
from titan_moe_lb.commands.plan.verdict import placed
from titan_moe_lb.costmodel.times.predict import Outcome
from titan_moe_lb.pages.charts import (
    PENS,
    Chart,
    Panel,
    Pen,
    add_bars,
    add_curve,
    blank_figure,
    label_curves,
)
from titan_moe_lb.pages.palette import color, ramp


def charts(plan: Plan) -> list[Chart]:
    """Step time, memory and the parts of a layer; what was measured where there is a run."""

    def of_step(draw: Callable[[Plan, Callable[[Outcome], float], str], go.Figure]) -> list[Panel]:
        return [
            Panel("a step, in time", draw(plan, lambda one: one.step_seconds * scale, unit)),
            Panel(
                "a step, against balance", draw(plan, lambda one: one.step_slowdown, "× balance")
            ),
        ]

    longest = max(row.outcome.step_seconds for degree in plan.degrees for row in degree.curve)
    scale, unit = (1.0, "s") if longest >= 0.1 else (1e3, "ms")
    made = [
        Chart(
            "Step time against imbalance",
            "One optimizer step at each expert-parallel degree, in time and against balance "
            "at the same degree: the time says which degree is fastest. The imbalance is the "
            "load of the most loaded expert over the mean.",
            of_step(_over_imbalance),
        ),
        Chart(
            "Memory against imbalance",
            "The rank that needs most: parameters, gradients, optimizer, what FSDP gathers, and "
            f"activations at their peak. Usable: {plan.usable_bytes / GIB:.1f} GiB.",
            [Panel("", _memory(plan))],
        ),
        Chart(
            "Where the time of an MoE layer goes",
            "Forward pass of one micro-batch on the busiest rank, by degree and imbalance.",
            [Panel("", _parts(plan))],
        ),
    ]
    if plan.run:
        made.append(
            Chart(
                "What the run's own load costs",
                "Step time at the first and at the last steps of the run, with experts placed in "
                "blocks (contiguous) and placed greedily for the last steps' load.",
                of_step(_measured),
            )
        )
    return made


def _over_imbalance(plan: Plan, value: Callable[[Outcome], float], title: str) -> go.Figure:
    figure = blank_figure(title, "imbalance")
    figure.update_xaxes(type="log", tickvals=_ticks(plan))
    for index, degree in enumerate(plan.degrees):
        x = np.array([row.imbalance_factor for row in degree.curve])
        y = np.array([value(row.outcome) for row in degree.curve])
        pen = Pen(ramp(index, len(plan.degrees)), PENS[index % len(PENS)].dash)
        add_curve(figure, f"EP {degree.ep_degree}", x, y, pen)
    label_curves(figure)
    return figure


def _ticks(plan: Plan) -> list[float]:
    """The imbalances that were asked for, and powers of two between."""
    asked = {round(row.imbalance_factor, 2) for row in plan.degrees[0].rows}
    most = plan.degrees[0].curve[-1].imbalance_factor
    return sorted(asked | {2.0**power for power in range(int(np.log2(most)) + 1)})


def _memory(plan: Plan) -> go.Figure:
    figure = _over_imbalance(plan, lambda outcome: outcome.memory_bytes / GIB, "GiB")
    usable = plan.usable_bytes / GIB
    low, high = figure.layout.yaxis.range
    if usable < 2 * high:  # a limit far above would press the curves together
        figure.add_hline(
            y=usable,
            line={"dash": "dash", "color": color("bad")},
            annotation={"text": f"usable: {usable:.1f} GiB", "font": {"color": color("bad")}},
            annotation_position="top left",
        )
        figure.update_yaxes(range=[low, max(high, 1.08 * usable)])
    return figure


def _parts(plan: Plan) -> go.Figure:
    rows = [(degree.ep_degree, row) for degree in plan.degrees for row in degree.rows]
    labels = [
        [f"EP {ep_degree}" for ep_degree, _row in rows],
        [f"{row.imbalance_factor:.3g}" for _ep_degree, row in rows],
    ]
    figure = blank_figure("ms", "imbalance at each EP degree")
    for index, name in enumerate(("compute", "dispatch", "combine")):
        values = [getattr(row.outcome, f"{name}_seconds") * 1e3 for _ep_degree, row in rows]
        add_bars(figure, name, labels, values, index)
    figure.update_layout(barmode="stack", margin_b=56)
    return figure


def _measured(plan: Plan, value: Callable[[Outcome], float], title: str) -> go.Figure:
    figure = blank_figure(title, "expert-parallel degree")
    labels = [f"EP {degree.ep_degree}" for degree in plan.degrees]
    shown = [(0, "first"), *((place, "last") for place in range(len(plan.degrees[0].measured)))]
    for index, (place, when) in enumerate(shown):
        rows = [degree.measured[place] for degree in plan.degrees]
        values = [value(getattr(row, when)) for row in rows]
        add_bars(figure, f"{placed(rows[0])}, {when} steps", labels, values, index)
    return figure
