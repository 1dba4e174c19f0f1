"""Map of the load of every expert, and curve of one expert. The page's script adds the data."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from titan_moe_lb.pages.charts import MARKS, PENS, blank_figure
from titan_moe_lb.pages.palette import color
from titan_moe_lb.traces.trace import Trace

# Octaves of the load relative to balance. An expert without tokens is below the scale.
COLOR_RANGE = 2.0
DEAD = -2.5
LOAD_COLORS = [color(f"load-{index}") for index in range(5)]
"""Colours at equal distances over the octaves."""

MOST_NUMBERED = (24, 12)
"""Most layers and experts of a map whose cells show their number."""


def heatmap(trace: Trace) -> go.Figure:
    """Make the map of one run, with crosses for experts without tokens."""
    num_layers, num_experts = len(trace.layers), trace.info.num_experts
    numbered = num_layers <= MOST_NUMBERED[0] and num_experts <= MOST_NUMBERED[1]
    every_layer, every_expert = -(-num_layers // 12), _round_spacing(num_experts)
    row_height = 22 if numbered else 9
    figure = blank_figure(
        "layer", "expert", height=int(np.clip(row_height * num_layers, 120, 560)) + 60
    )
    layers = [str(layer) for layer in trace.layers]
    figure.add_heatmap(
        y=layers,
        zmin=DEAD,
        zmax=COLOR_RANGE,
        colorscale=_color_scale(),
        hovertemplate="layer %{y}, expert %{x}<br>%{text} × balanced<extra></extra>",
        texttemplate="%{text}" if numbered else None,
        xgap=1 if num_experts <= 64 else 0,
        ygap=1 if num_layers <= 32 else 0,
        showscale=False,
    )
    marker = {"symbol": "x-thin", "line": {"color": color("cross"), "width": 1.5}}
    figure.add_scatter(mode="markers", marker=marker, hoverinfo="skip", showlegend=False)
    for role, width in (("surface", 5), ("ink", 2)):  # frame of the picked expert
        figure.add_shape(type="rect", line={"color": color(role), "width": width})
    figure.update_xaxes(
        range=[-0.5, num_experts - 0.5],
        tickvals=list(range(0, num_experts, every_expert)),
        showgrid=False,
    )
    figure.update_yaxes(
        range=[num_layers - 0.5, -0.5],
        type="category",
        tickvals=layers[::every_layer],
        showgrid=False,
    )
    figure.update_layout(hovermode="closest", margin={"l": 44, "r": 8, "t": 6, "b": 40})
    return figure


def course(traces: list[Trace]) -> go.Figure:
    """Make the figure of the picked expert over steps, with a curve for each run."""
    figure = blank_figure("load / balanced", height=240)
    for mark, pen, _trace in zip(MARKS, PENS, traces, strict=False):
        line = {"color": pen.color, "dash": pen.dash}
        figure.add_scatter(name=mark, line=line, hovertemplate="%{y:.2f} ×")
    # Position of the slider.
    figure.add_shape(
        type="line", yref="paper", y0=0, y1=1, line={"dash": "dot", "color": color("soft")}
    )
    figure.update_yaxes(rangemode="tozero")
    figure.update_layout(showlegend=len(traces) > 1)
    return figure


def _round_spacing(length: int) -> int:
    """Return the smallest power of two that makes at most 8 ticks."""
    return 1 << max(0, (length - 1) // 8).bit_length()


def _color_scale() -> list[list]:
    """Return plotly's colour scale: the colour of dead experts, then LOAD_COLORS."""
    span = COLOR_RANGE - DEAD
    above_dead = (-COLOR_RANGE - DEAD) / 2 / span
    octaves = np.linspace(-COLOR_RANGE, COLOR_RANGE, len(LOAD_COLORS))
    positions = [above_dead, *((octaves[1:] - DEAD) / span).tolist()]
    scale = zip(positions, LOAD_COLORS, strict=True)
    return [[0.0, color("dead")], [above_dead, color("dead")], *map(list, scale)]
