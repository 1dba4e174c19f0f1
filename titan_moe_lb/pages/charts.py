"""A chart: a plotly figure in the style of the pages, with its title and its sentence."""

from __future__ import annotations

from dataclasses import dataclass

import plotly.graph_objects as go

INK, _GRID = "#2b2f36", "#e6e3dc"


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart: the figure of each run, under one title and one sentence."""

    title: str
    text: str
    figures: list[go.Figure]


def blank_figure(height: int = 320) -> go.Figure:
    figure = go.Figure(
        layout={
            "template": "none",
            "height": height,
            "margin": {"l": 52, "r": 12, "t": 8, "b": 40},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"family": "system-ui, sans-serif", "size": 12, "color": INK},
            "hovermode": "x unified",
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        }
    )
    figure.update_xaxes(title="step", gridcolor=_GRID, zeroline=False, automargin=True)
    figure.update_yaxes(gridcolor=_GRID, zeroline=False, automargin=True)
    return figure
