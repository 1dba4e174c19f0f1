"""The charts of the page, as plotly figures: one per chart and run."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from titan_moe_lb.pages.charts import INK, Chart, blank_figure
from titan_moe_lb.report.load_codes import shown_steps
from titan_moe_lb.traces.balance_statistics import max_violation
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
_BLUE, _ORANGE, _RED, _GREY, _GREEN = "#2a5d9f", "#d9822b", "#b3261e", "#7a7f87", "#3d7d5a"


def charts(traces: list[Trace]) -> list[Chart]:
    """Everything over steps. Runs side by side have the same axes."""
    names = dict.fromkeys(name for trace in traces for name in trace.losses)
    made = [
        Chart(
            "MaxVio over steps",
            "How far the fullest expert is above the mean load of its layer, over the global "
            "batch: 0 is balance. Mean, median, 95th percentile and maximum over the layers, and "
            "the mean of every micro-batch by itself.",
            [_max_violation(trace) for trace in traces],
        ),
        Chart(
            "Overload factors over steps",
            "Tokens on the most loaded expert-parallel rank over the balanced number: 1 is "
            "balance. The cumulative factor follows the tokens that are kept until their backward.",
            [_overload(trace) for trace in traces],
        ),
        *(
            Chart(
                f"Aux loss per layer: {name}",
                "Raw and unweighted. One thin line per layer, early layers dark, late layers "
                "light; the thick line is their mean.",
                [_loss(trace, name) for trace in traces],
            )
            for name in names
        ),
    ]
    for chart in made:
        _share_axes(chart.figures)
    return made


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
    for mark, color, _trace in zip("AB", (_BLUE, _RED), traces, strict=False):
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


def _max_violation(trace: Trace) -> go.Figure:
    figure = blank_figure()
    violation_SM = max_violation(trace.counts_SME)
    steps = shown_steps(len(trace.steps), MOST_POINTS)
    curves = [
        ("maximum", violation_SM.max(axis=1), _RED, 1.2),
        ("p95", np.percentile(violation_SM, 95, axis=1), _ORANGE, 1.2),
        ("p50", np.percentile(violation_SM, 50, axis=1), _BLUE, 1.2),
        ("mean", violation_SM.mean(axis=1), INK, 2.4),
        ("micro-batch", trace.micro_batch_max_violation_SM.mean(axis=1), _GREY, 1.2),
    ]
    for name, values_S, color, width in curves:
        _add_curve(figure, trace, name, values_S, steps, color=color, width=width)
    return figure


def _overload(trace: Trace) -> go.Figure:
    figure = blank_figure()
    steps = shown_steps(len(trace.steps), MOST_POINTS)
    curves = [
        ("maximum", trace.max_overload_factor_SM.max(axis=1), _RED, 1.2),
        ("mean", trace.avg_overload_factor_SM.mean(axis=1), INK, 2.4),
        ("cumulative", trace.max_cum_overload_factor_S, _GREEN, 1.6),
    ]
    for name, values_S, color, width in curves:
        _add_curve(figure, trace, name, values_S, steps, color=color, width=width)
    return figure


def _loss(trace: Trace, name: str) -> go.Figure:
    figure = blank_figure()
    num_layers = len(trace.layers)
    values_SM = trace.losses.get(name, np.full((len(trace.steps), num_layers), np.nan))
    steps = shown_steps(len(trace.steps), MOST_POINTS_PER_LAYER)
    colors = sample_colorscale("Viridis", np.linspace(0, 0.9, num_layers).tolist())
    for index, layer in enumerate(trace.layers):
        if not np.isnan(values_SM[:, index]).all():
            _add_curve(
                figure,
                trace,
                f"layer {layer}",
                values_SM[:, index],
                steps,
                color=colors[index],
                width=1.0,
            )
    figure.update_traces(opacity=0.55 if num_layers > 8 else 0.9)
    recorded_S = ~np.isnan(values_SM).all(axis=1)
    mean_S = np.full(len(trace.steps), np.nan)
    mean_S[recorded_S] = np.nanmean(values_SM[recorded_S], axis=1)
    _add_curve(figure, trace, "mean", mean_S, steps, color=INK, width=2.8)
    if not recorded_S.any():
        figure.add_annotation(text="this run has no such loss", showarrow=False, font_size=14)
    figure.update_layout(showlegend=num_layers <= 8, hovermode="closest")
    return figure


def _add_curve(
    figure: go.Figure,
    trace: Trace,
    name: str,
    values_S: np.ndarray,
    steps: np.ndarray,
    *,
    color: str,
    width: float,
) -> None:
    figure.add_scatter(
        x=trace.steps[steps].astype(np.int32),
        y=values_S[steps].astype(np.float32),
        name=name,
        mode="lines" if len(steps) > 1 else "markers",
        line={"color": color, "width": width},
        marker={"color": color},
        hovertemplate=f"{name}: %{{y:.3f}}<extra>step %{{x}}</extra>",
    )


def _share_axes(figures: list[go.Figure]) -> None:
    """The same ranges for the charts of two runs, so that the eye can compare them."""
    for axis, select in (("x", lambda curve: curve.x), ("y", lambda curve: curve.y)):
        values = np.concatenate([select(curve) for figure in figures for curve in figure.data])
        values = values[np.isfinite(values)]
        if not len(values):
            continue
        low, high = float(values.min()), float(values.max())
        margin = (0.06 if axis == "y" else 0.01) * ((high - low) or abs(high) or 1.0)
        for figure in figures:
            figure.layout[f"{axis}axis"].range = [low - margin, high + margin]
