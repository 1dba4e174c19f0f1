"""The page: one HTML file that needs neither a network nor the trace."""

from __future__ import annotations

import base64
import json
from typing import Any

import plotly.graph_objects as go

from titan_moe_lb.pages import html_page
from titan_moe_lb.report import figures, load_codes, summary
from titan_moe_lb.traces.trace import Trace

MOST_FRAMES = 400
"""Steps of the slider at most: more cannot be told apart by a hand."""
MOST_PAGE_BYTES = 4_950_000
"""Fewer of these steps are embedded where the page would be larger."""
_MARKUP_BYTES = 60_000


def render(traces: list[Trace]) -> str:
    """The page of one run, or of runs of one model side by side."""
    charts = figures.charts(traces)
    drawings = html_page.packed(
        json.dumps([[_plain(figure) for figure in chart.figures] for chart in charts])
    )
    rest = MOST_PAGE_BYTES - _MARKUP_BYTES - len(drawings) - len(html_page.packed_plotly())
    most_load_bytes = rest * 3 // 4 // len(traces)  # base64 makes 4 bytes of 3
    runs = [
        _run(mark, trace, most_load_bytes)
        for mark, trace in zip(figures.MARKS, traces, strict=False)
    ]
    data = {
        "lowestOctave": load_codes.LOWEST_OCTAVE,
        "levelsPerOctave": load_codes.LEVELS_PER_OCTAVE,
        "dead": figures.DEAD,
        "colorRange": figures.COLOR_RANGE,
        "course": _plain(figures.course(traces)),
        "runs": [
            {
                "frames": run["frames"],
                "layers": trace.layers,
                "numExperts": trace.info.num_experts,
                "heatmap": _plain(figures.heatmap(trace)),
            }
            for run, trace in zip(runs, traces, strict=True)
        ],
    }
    return html_page.render(
        "report/page.html.jinja",
        runs=runs,
        charts=charts,
        load_colors=figures.LOAD_COLORS,
        dead_color=figures.DEAD_COLOR,
        data=html_page.packed(json.dumps(data)),
        drawings=drawings,
    )


def _run(mark: str, trace: Trace, most_load_bytes: int) -> dict[str, Any]:
    """What the template shows of one run."""
    loads, frames = load_codes.pack_within(trace.counts_SME, MOST_FRAMES, most_load_bytes)
    hottest, coldest = summary.hottest_and_coldest(trace)
    return {
        "mark": mark,
        "trace": trace,
        "folder": trace.path.parent.resolve().name,
        "cards": summary.cards(trace, hottest[0]),
        "tables": [("Hottest experts", hottest), ("Coldest experts", coldest)],
        "frames": trace.steps[frames].tolist(),
        "thinned": len(frames) < len(trace.steps),
        "loads": base64.b64encode(loads).decode(),
    }


def _plain(figure: go.Figure) -> dict[str, Any]:
    """The figure as plotly's script takes it."""
    return json.loads(figure.to_json())
