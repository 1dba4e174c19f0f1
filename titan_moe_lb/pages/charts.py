"""Charts: plotly figures in the style of the pages.

Curves differ by dash and by the label at their end, so that no curve depends on its colour alone.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from titan_moe_lb.pages.palette import color

MOST_LABELS = 10
"""Largest number of labels that fit beside a figure."""
_LABEL_HEIGHT, _LETTER_WIDTH = 16, 7
_PLOT_WIDTH = 400
"""Width of a figure in pixels, for labels that must not overlap; it depends on the reader."""


@dataclass(frozen=True, slots=True)
class Panel:
    """Figure with its caption."""

    caption: str
    figure: go.Figure


@dataclass(frozen=True, slots=True)
class Chart:
    """Panels under one title and one text, side by side if the page is wide enough."""

    title: str
    text: str
    panels: list[Panel]


@dataclass(frozen=True, slots=True)
class Pen:
    """Style of a curve; ``color`` is a reference to a role of the palette."""

    color: str
    dash: str = "solid"
    width: float = 1.8


_HUES = ("blue", "orange", "green", "violet", "grey")
_PATTERNS = ("", "/", ".", "x")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
PENS = [
    Pen(color(hue), dash)
    for hue, dash in itertools.islice(zip(itertools.cycle(_HUES), itertools.cycle(_DASHES)), 30)
]
"""Distinct pens for things without an order, such as runs; neighbours differ in hue and dash."""
MARKS = (*string.ascii_uppercase, "AA", "AB", "AC", "AD")
"""A short label for each of :data:`PENS`."""


def blank_figure(
    y_title: str, x_title: str = "step", height: int = 300, labels: int = 0
) -> go.Figure:
    """Make a figure with axes and without data, and with room for a number of labels."""
    height = max(height, _LABEL_HEIGHT * labels + 48)
    figure = go.Figure(
        layout={
            "template": "none",
            "height": height,
            "margin": {"l": 52, "r": 12, "t": 8, "b": 40},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"family": "system-ui, sans-serif", "size": 12, "color": color("ink")},
            "hovermode": "x unified",
            "hoverlabel": {"bgcolor": color("surface"), "bordercolor": color("edge")},
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
            "showlegend": False,
        }
    )
    style = {"gridcolor": color("grid"), "zeroline": False, "automargin": True}
    figure.update_xaxes(title=x_title, **style)
    figure.update_yaxes(title=y_title, **style)
    return figure


def add_curve(figure: go.Figure, name: str, x: np.ndarray, y: np.ndarray, pen: Pen) -> None:
    """Add a curve to a figure; draw a single point as a marker."""
    figure.add_scatter(
        x=x,
        y=y,
        name=name,
        mode="lines" if len(x) > 1 else "markers",
        line={"color": pen.color, "width": pen.width, "dash": pen.dash},
        marker={"color": pen.color},
        hovertemplate=f"{name}: %{{y:.4g}}<extra></extra>",
    )


def add_bars(figure: go.Figure, name: str, x: Sequence[Any], y: Sequence[float], pen: int) -> None:
    """Add a series of bars with a hue and a pattern, and show the legend.

    Args:
        figure: figure to draw in.
        name: name of the series.
        x: position of each bar.
        y: height of each bar.
        pen: index of the pattern, and of the pen that has the hue.
    """
    pattern = {"shape": _PATTERNS[pen], "fillmode": "overlay", "fgcolor": color("surface")}
    figure.add_bar(
        x=x,
        y=y,
        name=name,
        marker={
            "color": PENS[pen].color,
            "line": {"color": color("surface"), "width": 1},
            "pattern": pattern | {"size": 7, "solidity": 0.3},
        },
        hovertemplate=f"{name}: %{{y:.3g}}<extra></extra>",
    )
    figure.update_layout(showlegend=True)
    figure.update_xaxes(showgrid=False)


def label_curves(
    figure: go.Figure, labelled: list[str] | None = None, levels: Iterable[float] = ()
) -> None:
    """Label curves at their ends without overlap, and set the ranges of the axes.

    Args:
        figure: figure with all its curves; the x axis may be logarithmic.
        labelled: names of the curves to label; default: all.
        levels: further values that the y axis includes.
    """
    curves = [curve for curve in figure.data if np.isfinite(curve.y).any()]
    if not curves:
        return
    values = np.concatenate([*(curve.y[np.isfinite(curve.y)] for curve in curves), [*levels]])
    low, high = float(values.min()), float(values.max())
    margin = 0.06 * ((high - low) or abs(high) or 1.0)
    low, high = low - margin, high + margin
    figure.update_yaxes(range=[low, high])
    logarithmic = figure.layout.xaxis.type == "log"
    all_x = np.concatenate([curve.x for curve in curves])
    left, right = (float(np.log10(x) if logarithmic else x) for x in (all_x.min(), all_x.max()))
    pad = 0.01 * ((right - left) or 1.0)
    figure.update_xaxes(range=[left - pad, right + pad])
    named = [curve for curve in curves if labelled is None or curve.name in labelled]
    ends = [int(np.flatnonzero(np.isfinite(curve.y))[-1]) for curve in named]
    xs = np.array([float(curve.x[end]) for curve, end in zip(named, ends, strict=True)])
    xs = np.log10(xs) if logarithmic else xs
    ys = np.array([float(curve.y[end]) for curve, end in zip(named, ends, strict=True)])
    heights = (ys - low) / (high - low)
    longest = max((len(curve.name) for curve in named), default=0)
    gap = _LABEL_HEIGHT / (figure.layout.height - figure.layout.margin.t - figure.layout.margin.b)
    beside = (right - left) * _LETTER_WIDTH * longest / _PLOT_WIDTH
    order = xs.argsort(kind="stable")
    for here in np.split(order, np.flatnonzero(np.diff(xs[order]) > beside) + 1):
        here = here[heights[here].argsort(kind="stable")]
        heights[here] = _apart(heights[here], min(gap, 1 / max(1, len(here))))
    for curve, x, height in zip(named, xs, heights, strict=True):
        figure.add_annotation(
            text=curve.name,
            x=float(x),
            y=float(height),
            yref="paper",
            xanchor="left",
            yanchor="middle",  # plotly's default depends on the height
            xshift=4,
            showarrow=False,
            font={"color": curve.line.color},
        )
    figure.update_layout(margin_r=16 + _LETTER_WIDTH * longest)


def _apart(heights: np.ndarray, gap: float) -> np.ndarray:
    """Move ascending heights in [0, 1] so that each is at least ``gap`` above the one before."""
    steps = gap * np.arange(len(heights))
    upwards = np.maximum.accumulate(heights - steps) + steps
    top = 1 - gap * np.arange(len(heights))[::-1]
    return np.minimum(upwards, top)
