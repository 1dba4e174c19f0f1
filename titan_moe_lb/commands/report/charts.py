"""Charts over steps.

A page of one run draws several curves in a panel. A page of several runs draws one quantity in a
panel, with a curve for each run.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go

from titan_moe_lb.commands.report.load_codes import shown_steps
from titan_moe_lb.commands.report.summary import number
from titan_moe_lb.pages.charts import (
    MARKS,
    MOST_LABELS,
    PENS,
    Chart,
    Panel,
    Pen,
    add_curve,
    blank_figure,
    label_curves,
)
from titan_moe_lb.pages.palette import color, ramp
from titan_moe_lb.traces.balance_statistics import max_violation, num_dead_experts
from titan_moe_lb.traces.columns import Column
from titan_moe_lb.traces.trace import Trace

MOST_POINTS = 1000
"""Largest number of points of a curve."""
MOST_POINTS_PER_LAYER = 200
"""Largest number of points of a curve in a panel with a curve for every layer."""
MOST_POINTS_OF_RUNS = 6000
"""Largest number of points of all curves of a panel with a curve for every run."""

_MAIN = Pen(color("ink"), width=2.4)
_HIGHEST = Pen(color("red"), "dot")
_HIGH = Pen(color("orange"), "dash")
_MIDDLE = Pen(color("blue"), "dashdot")
_OTHER = Pen(color("violet"), "longdash")


@dataclass(frozen=True, slots=True)
class _Curve:
    """Name of a series, and its label and pen."""

    name: str
    label: str
    pen: Pen = PENS[0]
    only_alone: bool = False
    """True if the page of several runs leaves it out."""


@dataclass(frozen=True, slots=True)
class _Axes:
    """Curves that share their axes, the most important first."""

    title: str
    curves: tuple[_Curve, ...]

    def caption(self, curve: _Curve) -> str:
        """Name one of the curves; the title tells it apart from curves of other axes."""
        return curve.label if len(self.curves) == 1 else f"{self.title}, {curve.label}"


_CHARTS = (
    (
        "Balance and learning",
        "Does balancing cost the model anything? The language-model loss of the global batch, "
        "and MaxVio over the same steps: how far the fullest expert is above the mean load of its "
        "layer, over the global batch, where 0 is balance. Over the layers, and the mean of every "
        "micro-batch by itself.",
        (
            _Axes("loss", (_Curve("loss", "loss"),)),
            _Axes(
                "MaxVio",
                (
                    _Curve("MaxVio mean", "mean", _MAIN),
                    _Curve("MaxVio maximum", "maximum", _HIGHEST),
                    _Curve("MaxVio p95", "p95", _HIGH, only_alone=True),
                    _Curve("MaxVio p50", "p50", _MIDDLE, only_alone=True),
                    _Curve("micro_batch_max_violation", "micro-batch", _OTHER),
                ),
            ),
        ),
    ),
    (
        "Gradient norm and throughput",
        "Norm of the gradient before clipping, and tokens per second and device as torchtitan "
        "counts them, over the steps since the one that was logged before.",
        (
            _Axes("grad norm", (_Curve("grad_norm", "grad norm"),)),
            _Axes("tokens per second", (_Curve("tokens_per_second", "tokens per second"),)),
        ),
    ),
    (
        "Overload factors over steps",
        "Tokens on the most loaded expert-parallel rank over the balanced number: 1 is "
        "balance. The cumulative factor follows the tokens that are kept until their backward.",
        (
            _Axes(
                "tokens / balanced",
                (
                    _Curve("avg_overload_factor", "mean", _MAIN),
                    _Curve("max_overload_factor", "maximum", _HIGHEST),
                    _Curve("max_cum_overload_factor", "cumulative", _MIDDLE),
                ),
            ),
        ),
    ),
    (
        "Experts without a token",
        "Experts of all layers that got no token in a step.",
        (_Axes("experts", (_Curve("dead experts", "dead"),)),),
    ),
    (
        "Tokens with a small margin",
        "Share of the tokens whose last chosen expert and the next one would change places if a "
        "logit changed by a part of the logits' RMS, mean over the layers.",
        (
            _Axes(
                "share of tokens",
                tuple(
                    _Curve(f"margin_below_1_{part}", f"by 1/{part}", pen)
                    for part, pen in zip((2, 8, 32, 128, 512, 2048), PENS, strict=False)
                ),
            ),
        ),
    ),
)
"""Title, text and axes of each of the fixed charts."""
_SHOWN_ABOVE = {curve.name for *_, axes in _CHARTS for one in axes for curve in one.curves} | {
    "step_seconds"
}
"""Columns without a chart of their own. ``step_seconds`` repeats the throughput."""
_NOTHING = {
    "dead experts": 0.0,
    "avg_overload_factor": 1.0,
    "max_overload_factor": 1.0,
    "max_cum_overload_factor": 1.0,
    "activation_slot_factor": 1.0,
}
"""Values of curves that have nothing to show, as the overload of a single rank."""
_SUMMARIES = {"mean": "mean", "max": "maximum", "sum": "sum"}


def charts(traces: list[Trace]) -> list[Chart]:
    """Make all charts over steps.

    Each column that no fixed chart contains gets a chart of its own.
    """
    series = [_series(trace) for trace in traces]

    def known(curve: _Curve) -> bool:
        values = [one[curve.name] for one in series if curve.name in one]
        nothing = _NOTHING.get(curve.name)
        return any((np.isfinite(one_S) & (one_S != nothing)).any() for one_S in values)

    def panels(axes: tuple[_Axes, ...]) -> list[Panel]:
        shown = [_Axes(one.title, tuple(filter(known, one.curves))) for one in axes]
        if len(traces) == 1:
            return [_of_run(traces[0], series[0], one) for one in shown if one.curves]
        return [
            _of_curve(traces, series, one, curve)
            for one in shown
            for curve in one.curves
            if not curve.only_alone
        ]

    made = [Chart(title, text, panels(axes)) for title, text, axes in _CHARTS]
    declared = {column.name: column for trace in traces for column in trace.info.columns}
    for column in sorted(declared.values(), key=lambda column: not column.is_aux_loss):
        if column.name in _SHOWN_ABOVE:
            continue
        text = column.description.rstrip(".") + "." if column.description else ""
        title = column.heading[:1].upper() + column.heading[1:]
        if column.is_aux_loss:
            title, text = f"Aux loss per layer: {column.heading}", f"{text} Raw and unweighted."
        label = _SUMMARIES[column.summary] if column.per == "layer" else "value"
        if column.per == "step" or len(traces) > 1:
            y_title = f"{label} over the layers" if column.per == "layer" else label
            drawn = panels((_Axes(y_title, (_Curve(column.name, label),)),))
        elif known(_Curve(column.name, label)):
            drawn = [_per_layer(traces[0], column, label)]
            text = (
                f"{text} One thin line per layer, from violet for the first to green for the "
                f"last; the thick line is their {label}."
            )
        else:
            drawn = []
        made.append(Chart(title, text, drawn))
    return [chart for chart in made if chart.panels]


def _series(trace: Trace) -> dict[str, np.ndarray]:
    """Collect all series with one number per step, by name."""
    violation_SM = max_violation(trace.counts_SME)
    return {column.name: trace.over_steps(column.name) for column in trace.info.columns} | {
        "MaxVio maximum": violation_SM.max(axis=1),
        "MaxVio p95": np.percentile(violation_SM, 95, axis=1),
        "MaxVio p50": np.percentile(violation_SM, 50, axis=1),
        "MaxVio mean": violation_SM.mean(axis=1),
        "dead experts": num_dead_experts(trace.counts_SME).sum(axis=1),
    }


def _of_run(trace: Trace, series: dict[str, np.ndarray], axes: _Axes) -> Panel:
    """Draw all curves of some axes, for a single run."""
    drawn = blank_figure(axes.title)
    for curve in axes.curves:
        _add(drawn, trace, curve.label, series[curve.name], MOST_POINTS, curve.pen)
    label_curves(drawn, labelled=None if len(axes.curves) > 1 else [])
    _mark_resumptions(drawn, trace)
    first = axes.curves[0]
    return Panel(_course_of(axes.caption(first), series[first.name]), drawn)


def _of_curve(
    traces: list[Trace], series: list[dict[str, np.ndarray]], axes: _Axes, curve: _Curve
) -> Panel:
    """Draw one quantity, with a curve for each run."""
    drawn = blank_figure(axes.title, labels=len(traces))
    lacking = []
    most_points = min(MOST_POINTS, MOST_POINTS_OF_RUNS // len(traces))
    for mark, pen, trace, one in zip(MARKS, PENS, traces, series, strict=False):
        if curve.name in one and np.isfinite(one[curve.name]).any():
            _add(drawn, trace, mark, one[curve.name], most_points, pen)
        else:
            lacking.append(mark)
    label_curves(drawn)
    note = f" (not recorded by {', '.join(lacking)})" if lacking else ""
    return Panel(f"{axes.caption(curve)}{note}", drawn)


def _per_layer(trace: Trace, column: Column, label: str) -> Panel:
    drawn = blank_figure(f"each layer, and their {label}")
    values_SM = trace.layer_columns[column.name]
    num_layers = len(trace.layers)
    for index, (layer, values_S) in enumerate(zip(trace.layers, values_SM.T, strict=True)):
        if not np.isnan(values_S).all():
            pen = Pen(ramp(index, num_layers), width=1.0)
            _add(drawn, trace, f"layer {layer}", values_S, MOST_POINTS_PER_LAYER, pen)
    total_S = column.over_layers(values_SM)
    _add(drawn, trace, label, total_S, MOST_POINTS_PER_LAYER, Pen(color("ink"), width=2.8))
    label_curves(drawn, labelled=None if len(drawn.data) <= MOST_LABELS else [label])
    drawn.update_layout(hovermode="closest")
    _mark_resumptions(drawn, trace)
    return Panel(_course_of(label, total_S), drawn)


def _mark_resumptions(figure: go.Figure, trace: Trace) -> None:
    """Draw a line at each step where a run was resumed, since a curve may jump there."""
    for index, step in enumerate(trace.info.resumed_at):
        figure.add_vline(
            step,
            line={"dash": "dot", "width": 1, "color": color("edge")},
            annotation={"text": "" if index else "resumed", "font": {"color": color("soft")}},
        )


def _course_of(label: str, values_S: np.ndarray) -> str:
    known = values_S[np.isfinite(values_S)]
    return f"{label}: {number(known[0])} → {number(known[-1])}"


def _add(
    figure: go.Figure, trace: Trace, name: str, values_S: np.ndarray, most_points: int, pen: Pen
) -> None:
    steps = shown_steps(len(trace.steps), most_points)
    x, y = trace.steps[steps].astype(np.int32), values_S[steps].astype(np.float32)
    add_curve(figure, name, x, y, pen)
