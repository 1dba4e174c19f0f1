"""Charts of a study, with one panel for each model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import plotly.graph_objects as go

from titan_moe_lb.commands.study.results import Group, Setting, Spread
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
from titan_moe_lb.pages.palette import color

FEW = 4
"""Largest number of settings of which all curves are coloured."""
MOST_POINTS = 60
"""Most points of a curve; more steps are averaged in segments."""

_TICKS = [one * 10.0**power for power in range(-3, 4) for one in (1, 2, 3, 5)]


def charts(groups: Sequence[Group], balanced_below: float) -> list[Chart]:
    """Draw the costs and benefits of each model's settings."""
    made = [
        _fronts(
            groups,
            "max_violation",
            "MaxVio",
            "Loss against imbalance",
            "A point is a setting, numbered as in the table: mean over its seeds, with the lowest "
            "and highest. MaxVio is that of the global batch, over the last quarter of the steps. "
            "Left and low is better: the line joins the settings that none beats in both.",
        ),
        _fronts(
            groups,
            "step_slowdown",
            "step time lost to imbalance, %",
            "Loss against predicted step time",
            "The same against what the imbalance adds to a step of the planned job at balance.",
        ),
        _courses(
            groups,
            "MaxVio, mean over layers",
            "violation_S",
            "MaxVio over steps",
            f"A step counts as balanced below {balanced_below:g}. In colour, with a thin line for each "
            "seed: the settings that none beats in loss and MaxVio, and the least even one; in "
            "grey the means of the others, whose names show where you point.",
        ),
        _courses(
            groups,
            "training loss",
            "loss_S",
            "Training loss over steps",
            "Of the language model, over the global batch; the same settings in colour.",
        ),
        Chart(
            "Steps until balanced",
            f"First logged step from which on MaxVio stays below {balanced_below:g}: mean over the "
            "seeds, with the lowest and highest. No bar: never, in some seed.",
            [Panel(group.name, _bars(group, "steps_until_balanced", "step")) for group in groups],
        ),
        Chart(
            "Load by domain",
            "How many balanced experts would have the entropy of the load of each held-out domain: "
            "the fewer, the more the experts specialise.",
            [Panel(group.name, _by_domain(group)) for group in groups if _domains(group)],
        ),
        Chart(
            "Do the domains use different experts?",
            "Total variation distance of the loads of the domains, mean over layers: 0 is the same "
            "experts, 1 none in common.",
            [
                Panel(group.name, _bars(group, "specialisation", "distance"))
                for group in groups
                if group.knows("specialisation")
            ],
        ),
    ]
    return [chart for chart in made if chart.panels]


def _fronts(groups: Sequence[Group], cost: str, x_title: str, title: str, text: str) -> Chart:
    panels = [Panel(g.name, _front(g, cost, x_title)) for g in groups if g.knows(cost)]
    return Chart(title, text, panels)


def _courses(groups: Sequence[Group], y_title: str, course: str, title: str, text: str) -> Chart:
    return Chart(title, text, [Panel(g.name, _curves(g, y_title, course)) for g in groups])


def _front(group: Group, cost: str, x_title: str) -> go.Figure:
    figure = blank_figure(group.loss.replace("_", " "), x_title=x_title, height=380)
    front = group.front(cost)
    if len(front) > 1:
        figure.add_scatter(
            x=[_x(setting, cost).mean for setting in front],
            y=[setting.spread(group.loss).mean for setting in front],
            mode="lines",
            line={"color": color("accent"), "width": 1.5, "dash": "dot"},
            hoverinfo="skip",
        )
    for number, setting in enumerate(group.settings, start=1):
        x, y = _x(setting, cost), setting.spread(group.loss)
        if math.isnan(x.mean):
            continue
        hue = color("accent") if setting in front else color("grey")
        bars = {"type": "data", "symmetric": False, "thickness": 1, "width": 3, "color": hue}
        figure.add_scatter(
            x=[x.mean],
            y=[y.mean],
            error_x={**bars, "array": [x.high - x.mean], "arrayminus": [x.mean - x.low]},
            error_y={**bars, "array": [y.high - y.mean], "arrayminus": [y.mean - y.low]},
            mode="markers+text",
            text=[str(number)],
            textposition="top right",
            textfont={"color": hue, "size": 13},
            marker={
                "color": hue,
                "size": 9,
                "symbol": "circle" if setting in front else "circle-open",
            },
            name=setting.name,
            hovertemplate=f"{setting.name}<br>{x_title} %{{x:.4g}}<br>loss %{{y:.4g}}<extra></extra>",
        )
    figure.update_layout(hovermode="closest", margin_t=20)
    # A setting without balancing is far from all others: a log scale, unless a cost is 0. Within a
    # factor of 4 it might have no two ticks.
    costs = [point for curve in figure.data for point in curve.x]
    if costs and min(costs) > 0 and max(costs) > 4 * min(costs):
        figure.update_xaxes(type="log", tickvals=_TICKS, ticktext=[f"{tick:g}" for tick in _TICKS])
    return figure


def _x(setting: Setting, cost: str) -> Spread:
    """Convert a cost for its axis: a step slowdown becomes lost time in percent."""
    spread = setting.spread(cost)
    if cost != "step_slowdown":
        return spread
    return Spread(**{name: 100 * (value - 1) for name, value in asdict(spread).items()})


def _curves(group: Group, y_title: str, course: str) -> go.Figure:
    figure = blank_figure(y_title, height=420)
    coloured = [setting.name for setting in _in_colour(group)]
    hues = (Pen(p.color, p.dash, width=2.2) for p in PENS if p.color != color("grey"))
    pens = dict(zip(coloured, hues, strict=False))
    labels = {one.name: f"{number} {one.name}" for number, one in enumerate(group.settings, 1)}
    # Draw grey curves first, so that they do not cover the coloured ones.
    for setting in sorted(group.settings, key=lambda setting: setting.name in pens):
        seeds = [
            (result.course.steps, getattr(result.course, course))
            for result in setting.results
            if result.course is not None
        ]
        if not seeds:
            continue
        shortest = min(len(steps) for steps, _values in seeds)
        steps = _stretches(seeds[0][0][:shortest].astype(float))
        rows = [_stretches(values[:shortest]) for _steps, values in seeds]
        pen = pens.get(setting.name, Pen(color("grey"), width=0.8))
        for row in rows if setting.name in pens and len(rows) > 1 else ():
            add_curve(figure, setting.name, steps, row, Pen(pen.color, width=0.5))
            figure.data[-1].update(hoverinfo="skip", hovertemplate=None)
        add_curve(figure, labels[setting.name], steps, np.mean(rows, axis=0), pen)
    label_curves(figure, [labels[name] for name in pens])
    for annotation in figure.layout.annotations:  # keep the number; the table lists the name
        annotation.text = annotation.text.partition(" ")[0]
    figure.update_layout(margin_r=34, hovermode="closest")
    return figure


def _in_colour(group: Group) -> list[Setting]:
    """Choose the coloured settings: the Pareto front and the least even one, or all of a few."""
    if len(group.settings) <= FEW:
        return list(group.settings)
    known = [setting for setting in group.settings if setting.complete]
    least_even = sorted(known, key=lambda setting: setting.spread("max_violation").mean)[-1:]
    found = [*group.front("max_violation"), *least_even]
    return [setting for setting in group.settings if setting in found]


def _stretches(values_S: np.ndarray) -> np.ndarray:
    """Average the steps in as many segments as a curve has points."""
    parts = np.array_split(values_S, min(MOST_POINTS, len(values_S)))
    return np.array([part.mean() for part in parts], dtype=np.float32)


def _by_domain(group: Group) -> go.Figure:
    figure = _over_settings(group, "experts")
    for pen, domain in enumerate(_domains(group)):
        numbers = [s.spread(f"effective_experts_of_{domain}").mean for s in group.settings]
        add_bars(figure, domain, _names(group), numbers, pen)
    figure.update_layout(barmode="group")
    known = [bar for data in figure.data for bar in data.y if bar is not None and bar == bar]
    if known:
        figure.update_yaxes(range=[0, max(known) * 1.1])
    return figure


def _bars(group: Group, number: str, y_title: str) -> go.Figure:
    figure = _over_settings(group, y_title)
    spreads = [setting.spread(number) for setting in group.settings]
    means = [s.mean if math.isfinite(s.high) else None for s in spreads]
    add_bars(figure, y_title, _names(group), means, 0)  # type: ignore[arg-type]
    figure.data[-1].error_y = {
        "type": "data",
        "symmetric": False,
        "color": color("ink"),
        "thickness": 1,
        "array": [s.high - s.mean if math.isfinite(s.high) else 0 for s in spreads],
        "arrayminus": [s.mean - s.low if math.isfinite(s.high) else 0 for s in spreads],
    }
    figure.update_layout(showlegend=False)
    return figure


def _over_settings(group: Group, y_title: str) -> go.Figure:
    figure = blank_figure(y_title, x_title="", height=380)
    figure.update_xaxes(tickangle=-40, type="category")
    figure.update_layout(hovermode="closest")
    return figure


def _names(group: Group) -> list[str]:
    return [f"{number} {setting.name}" for number, setting in enumerate(group.settings, start=1)]


def _domains(group: Group) -> list[str]:
    names = [name for one in group.settings for cell in one.results for name in cell.numbers]
    prefix = "effective_experts_of_"
    return [n.removeprefix(prefix) for n in dict.fromkeys(names) if n.startswith(prefix)]
