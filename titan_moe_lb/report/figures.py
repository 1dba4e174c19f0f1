"""The charts of the page, as plotly figures: one per chart and run."""

from __future__ import annotations

import itertools
import string

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from titan_moe_lb.pages.charts import INK, Chart, blank_figure
from titan_moe_lb.report.load_codes import shown_steps
from titan_moe_lb.traces.balance_statistics import max_violation
from titan_moe_lb.traces.figure import Figure
from titan_moe_lb.traces.trace import Trace

MOST_POINTS = 1000
"""Points of a curve."""
MOST_POINTS_PER_LAYER = 200
"""Points of each of the curves where every layer has one."""

# In octaves of the load relative to balance; an expert without tokens lies below the scale.
COLOR_RANGE = 2.0
DEAD = -2.5
LOAD_COLORS = ("#0b3c7d", "#5b9bd0", "#f1eee6", "#e8825b", "#8f1020")
"""Evenly spread over the octaves: blue below balance, red above."""
DEAD_COLOR = "#15171a"
MARKS = string.ascii_uppercase
"""What the runs of a page are called, in their order."""

_BLUE, _ORANGE, _RED, _GREY, _GREEN = "#2a5d9f", "#d9822b", "#b3261e", "#7a7f87", "#3d7d5a"
_OF_RUNS = (_BLUE, _RED, _GREEN, _ORANGE, _GREY)

_CHARTS = (
    (
        "Balance and learning",
        "Does balancing cost the model anything? The language-model loss of the global batch (left) "
        "and MaxVio, mean over the layers (right), over the same steps.",
        (("loss", "loss", _BLUE, 1.8, "y"), ("MaxVio mean", "MaxVio", _ORANGE, 1.8, "y2")),
    ),
    (
        "Gradient norm and throughput",
        "Norm of the gradient before clipping (left) and tokens per second and device as torchtitan "
        "counts them, over the steps since the one that was logged before (right).",
        (
            ("grad_norm", "grad norm", _BLUE, 1.8, "y"),
            ("tokens_per_second", "tokens per second", _ORANGE, 1.8, "y2"),
        ),
    ),
    (
        "MaxVio over steps",
        "How far the fullest expert is above the mean load of its layer, over the global "
        "batch: 0 is balance. Mean, median, 95th percentile and maximum over the layers, and "
        "the mean of every micro-batch by itself.",
        (
            ("MaxVio maximum", "maximum", _RED, 1.2, "y"),
            ("MaxVio p95", "p95", _ORANGE, 1.2, "y"),
            ("MaxVio p50", "p50", _BLUE, 1.2, "y"),
            ("MaxVio mean", "mean", INK, 2.4, "y"),
            ("micro_batch_max_violation", "micro-batch", _GREY, 1.2, "y"),
        ),
    ),
    (
        "Overload factors over steps",
        "Tokens on the most loaded expert-parallel rank over the balanced number: 1 is "
        "balance. The cumulative factor follows the tokens that are kept until their backward.",
        (
            ("max_overload_factor", "maximum", _RED, 1.2, "y"),
            ("avg_overload_factor", "mean", INK, 2.4, "y"),
            ("max_cum_overload_factor", "cumulative", _GREEN, 1.6, "y"),
        ),
    ),
)
"""Title, text and curves: what is drawn, its label, colour, width and axis."""
_SHOWN_ABOVE = {curve[0] for *_, curves in _CHARTS for curve in curves} | {"step_seconds"}
"""What needs no chart of its own; the seconds are the other side of the throughput."""
_SUMMARIES = {"mean": "mean", "max": "maximum", "sum": "sum"}


def charts(traces: list[Trace]) -> list[Chart]:
    """Everything over steps. Runs side by side have the same axes.

    A figure that has no place in the first charts gets a chart of its own, whatever it is.
    """
    series = [_series(trace) for trace in traces]

    def known(name: str) -> bool:
        return any(np.isfinite(one[name]).any() for one in series if name in one)

    def over_steps(curves: tuple[tuple, ...]) -> list[go.Figure]:
        pairs = zip(traces, series, strict=True)
        return [_over_steps(trace, one, curves) for trace, one in pairs]

    made = [
        Chart(title, text, over_steps(curves))
        for title, text, curves in _CHARTS
        if known(curves[0][0])
    ]
    declared = {figure.name: figure for trace in traces for figure in trace.info.figures}
    for figure in sorted(declared.values(), key=lambda figure: not figure.is_aux_loss):
        if figure.name in _SHOWN_ABOVE or not known(figure.name):
            continue
        title, text = figure.name, figure.description
        if figure.per == "step":
            drawn = over_steps(((figure.name, "value", INK, 1.8, "y"),))
        else:
            drawn = [_per_layer(trace, figure) for trace in traces]
            text = (
                f"{text} One thin line per layer, early layers dark, late layers light; the thick "
                f"line is their {_SUMMARIES[figure.summary]}."
            )
        if figure.is_aux_loss:
            title, text = f"Aux loss per layer: {title}", f"{text} Raw and unweighted."
        made.append(Chart(title, text, drawn))
    for chart in made:
        _share_axes(chart.figures)
    return made


def _series(trace: Trace) -> dict[str, np.ndarray]:
    """Everything that is one number per step, by name."""
    violation_SM = max_violation(trace.counts_SME)
    return {figure.name: trace.over_steps(figure.name) for figure in trace.info.figures} | {
        "MaxVio maximum": violation_SM.max(axis=1),
        "MaxVio p95": np.percentile(violation_SM, 95, axis=1),
        "MaxVio p50": np.percentile(violation_SM, 50, axis=1),
        "MaxVio mean": violation_SM.mean(axis=1),
    }


def heatmap(trace: Trace) -> go.Figure:
    """Layers x experts without data: the page's script fills in the step of its slider."""
    num_layers, num_experts = len(trace.layers), trace.info.num_experts
    every_layer, every_expert = -(-num_layers // 12), _round_spacing(num_experts)
    figure = blank_figure(height=int(np.clip(9 * num_layers, 120, 560)) + 60)
    layers = [str(layer) for layer in trace.layers]
    figure.add_heatmap(
        y=layers,
        zmin=DEAD,
        zmax=COLOR_RANGE,
        colorscale=_color_scale(),
        hovertemplate="layer %{y}, expert %{x}<br>%{customdata} × balanced<extra></extra>",
        xgap=1 if num_experts <= 64 else 0,
        ygap=1 if num_layers <= 32 else 0,
        showscale=False,
    )
    figure.update_xaxes(
        title="expert",
        range=[-0.5, num_experts - 0.5],
        tickvals=list(range(0, num_experts, every_expert)),
        showgrid=False,
    )
    figure.update_yaxes(
        title="layer",
        range=[num_layers - 0.5, -0.5],
        type="category",
        tickvals=layers[::every_layer],
        showgrid=False,
    )
    figure.update_layout(hovermode="closest", margin={"l": 44, "r": 8, "t": 6, "b": 40})
    return figure


def course(traces: list[Trace]) -> go.Figure:
    """One expert over the steps, one curve per run: the page's script fills in its loads."""
    figure = blank_figure(height=240)
    for mark, color, _trace in zip(MARKS, itertools.cycle(_OF_RUNS), traces, strict=False):
        figure.add_scatter(name=mark, line={"color": color}, hovertemplate="%{y:.2f} ×")
    figure.update_yaxes(title="load / balanced", rangemode="tozero")
    figure.update_layout(showlegend=len(traces) > 1)
    return figure


def _round_spacing(length: int) -> int:
    """The smallest power of two that leaves at most 8 ticks."""
    return 1 << max(0, (length - 1) // 8).bit_length()


def _color_scale() -> list[list]:
    """LOAD_COLORS over their octaves, and the dead expert's colour at the lower end."""
    span = COLOR_RANGE - DEAD
    above_dead = (-COLOR_RANGE - DEAD) / 2 / span
    octaves = np.linspace(-COLOR_RANGE, COLOR_RANGE, len(LOAD_COLORS))
    positions = [above_dead, *((octaves[1:] - DEAD) / span).tolist()]
    scale = zip(positions, LOAD_COLORS, strict=True)
    return [[0.0, DEAD_COLOR], [above_dead, DEAD_COLOR], *map(list, scale)]


def _over_steps(
    trace: Trace, series: dict[str, np.ndarray], curves: tuple[tuple, ...]
) -> go.Figure:
    """Where there is a second axis, each axis has the name and the colour of its curve."""
    drawn = blank_figure()
    steps = shown_steps(len(trace.steps), MOST_POINTS)
    nothing = np.full(len(trace.steps), np.nan)
    second = {"overlaying": "y", "side": "right", "tickmode": "auto", "automargin": True}
    for name, label, color, width, axis in curves:
        values_S = series.get(name, nothing)
        _add_curve(drawn, trace, label, values_S, steps, color=color, width=width, yaxis=axis)
        if curves[-1][-1] == "y2":
            title = {"text": label, "font": {"color": color}, "standoff": 12}
            drawn.update_layout({f"yaxis{axis[1:]}": {"title": title}})
            drawn.update_layout(yaxis2=second | {"showgrid": False, "zeroline": False})
    return _marked_if_empty(drawn, np.concatenate([curve.y for curve in drawn.data]))


def _per_layer(trace: Trace, figure: Figure) -> go.Figure:
    drawn = blank_figure()
    num_layers = len(trace.layers)
    nothing = np.full((len(trace.steps), num_layers), np.nan)
    values_SM = trace.figures.get(figure.name, nothing)
    steps = shown_steps(len(trace.steps), MOST_POINTS_PER_LAYER)
    colors = sample_colorscale("Viridis", np.linspace(0, 0.9, num_layers).tolist())
    for layer, values_S, color in zip(trace.layers, values_SM.T, colors, strict=True):
        if not np.isnan(values_S).all():
            _add_curve(drawn, trace, f"layer {layer}", values_S, steps, color=color, width=1.0)
    drawn.update_traces(opacity=0.55 if num_layers > 8 else 0.9)
    total_S = figure.over_layers(values_SM)
    _add_curve(drawn, trace, _SUMMARIES[figure.summary], total_S, steps, color=INK, width=2.8)
    drawn.update_layout(showlegend=num_layers <= 8, hovermode="closest")
    return _marked_if_empty(drawn, total_S)


def _marked_if_empty(drawn: go.Figure, values_S: np.ndarray) -> go.Figure:
    if not np.isfinite(values_S).any():
        drawn.add_annotation(text="this run has no such figure", showarrow=False, font_size=14)
    return drawn


def _add_curve(
    figure: go.Figure,
    trace: Trace,
    name: str,
    values_S: np.ndarray,
    steps: np.ndarray,
    *,
    color: str,
    width: float,
    yaxis: str = "y",
) -> None:
    figure.add_scatter(
        x=trace.steps[steps].astype(np.int32),
        y=values_S[steps].astype(np.float32),
        name=name,
        mode="lines" if len(steps) > 1 else "markers",
        line={"color": color, "width": width},
        marker={"color": color},
        hovertemplate=f"{name}: %{{y:.4g}}<extra>step %{{x}}</extra>",
        yaxis=yaxis,
    )


def _share_axes(figures: list[go.Figure]) -> None:
    """The same ranges for the charts of two runs, so that the eye can compare them."""
    curves = [curve for figure in figures for curve in figure.data]
    for axis in ("x", "y", "y2"):
        shown = [curve for curve in curves if axis in ("x", curve.yaxis)]
        values = np.concatenate([[], *(curve.x if axis == "x" else curve.y for curve in shown)])
        values = values[np.isfinite(values)]
        if not len(values):
            continue
        low, high = float(values.min()), float(values.max())
        margin = (0.01 if axis == "x" else 0.06) * ((high - low) or abs(high) or 1.0)
        for figure in figures:
            layout_axis = f"{axis[0]}axis{axis[1:]}"
            figure.layout[layout_axis].range = [low - margin, high + margin]
