"""Charts of a plan's page, as plotly figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from titan_moe_lb.commands.answer.words import GIB
from titan_moe_lb.commands.plan.result import Plan
from titan_moe_lb.costmodel.times.outcome import Outcome
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
    """Chart step time, memory and the parts of a layer, and the load of a run if there is one."""

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
            "load of the most loaded expert over the mean. A dashed line is the verdict under its own "
            "load, if that is not balance. The diamond is the run: the point on the curve of its "
            "degree where an imbalance costs as much as its load.",
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


def curves_by_degree(
    curves: Mapping[int, Iterable[tuple[float, float]]],
    *,
    y_title: str,
    x_title: str,
    ticks: Sequence[float],
    levels: Iterable[float] = (),
) -> go.Figure:
    """Draw one curve of points for each expert-parallel degree, over a logarithmic axis.

    The y axis includes the ``levels``.
    """
    figure = blank_figure(y_title, x_title)
    figure.update_xaxes(type="log", tickvals=ticks)
    for index, (degree, points) in enumerate(curves.items()):
        x, y = np.array(sorted(points)).T
        pen = Pen(ramp(index, len(curves)), PENS[index % len(PENS)].dash)
        add_curve(figure, f"EP {degree}", x, y, pen)
    label_curves(figure, levels=levels)
    return figure


def _over_imbalance(
    plan: Plan, value: Callable[[Outcome], float], title: str, limit: float | None = None
) -> go.Figure:
    """Draw a value over the imbalance, with lines at a limit and at the verdict's own load."""
    asked = {round(row.imbalance_factor, 2) for row in plan.degrees[0].rows}
    most = plan.degrees[0].curve[-1].imbalance_factor
    between = {2.0**power for power in range(int(np.log2(most)) + 1)}
    lines = {}
    if plan.verdict.load != "balance":
        lines[f"verdict: EP {plan.verdict.ep_degree}"] = value(plan.verdict.outcome)
    if limit is not None:
        lines[f"usable: {limit:.1f} {title}"] = limit
    figure = curves_by_degree(
        {
            degree.ep_degree: [(row.imbalance_factor, value(row.outcome)) for row in degree.curve]
            for degree in plan.degrees
        },
        y_title=title,
        x_title="imbalance",
        ticks=sorted(asked | between),
        levels=lines.values(),
    )
    for text, level in lines.items():
        role = "soft" if text.startswith("verdict") else "bad"
        figure.add_hline(
            y=level,
            line={"dash": "dash", "width": 1.5, "color": color(role)},
            annotation={
                "text": text,
                "font": {"color": color(role)},
                "bgcolor": color("surface"),
            },
            annotation_position="top left",
        )
    for degree in plan.degrees:
        if plan.of_run and degree.ep_degree == plan.of_run.ep_degree:
            points = [(value(row.outcome), row.imbalance_factor) for row in degree.curve]
            y, x = np.array(sorted(points)).T
            level = value(plan.of_run.outcome)
            _mark_run(figure, float(np.interp(level, y, x)), level)
    return figure


def _mark_run(figure: go.Figure, x: float, y: float) -> None:
    """Mark the load of the run; the x axis is logarithmic."""
    figure.add_scatter(
        x=[x],
        y=[y],
        mode="markers",
        marker={"color": color("ink"), "size": 10, "symbol": "diamond"},
        hovertemplate="this run: %{y:.4g}<extra></extra>",
    )
    figure.add_annotation(
        text="this run",
        x=float(np.log10(x)),
        y=y,
        xanchor="right",
        yanchor="bottom",
        xshift=-6,
        showarrow=False,
        font={"color": color("ink")},
    )


def _memory(plan: Plan) -> go.Figure:
    usable = plan.usable_bytes / GIB
    highest = max(row.outcome.memory_bytes for degree in plan.degrees for row in degree.curve)
    # A much higher limit would flatten the curves.
    limit = usable if usable < 2 * highest / GIB else None
    return _over_imbalance(plan, lambda outcome: outcome.memory_bytes / GIB, "GiB", limit)


def _parts(plan: Plan) -> go.Figure:
    rows = [
        (degree.ep_degree, name, outcome)
        for degree in plan.degrees
        for name, outcome in (
            *((f"{row.imbalance_factor:.3g}", row.outcome) for row in degree.rows),
            *((row.name, row.outcome) for row in degree.lognormal),
        )
    ]
    labels = [
        [f"EP {ep_degree}" for ep_degree, _name, _outcome in rows],
        [name for _ep_degree, name, _outcome in rows],
    ]
    figure = blank_figure("ms", "imbalance at each EP degree")
    for index, name in enumerate(("compute", "dispatch", "combine")):
        values = [getattr(outcome, f"{name}_seconds") * 1e3 for *_row, outcome in rows]
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
        add_bars(figure, f"{rows[0].label}, {when} steps", labels, values, index)
    return figure
