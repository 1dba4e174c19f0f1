"""The page: one HTML file that needs neither a network nor the trace."""

from __future__ import annotations

import base64
import json
import zlib

import jinja2
from plotly.offline import get_plotlyjs

from titan_moe_lb.report import figures, load_codes, summary
from titan_moe_lb.telemetry.trace import Trace

MOST_FRAMES = 400
"""Steps of the slider at most: more cannot be told apart by a hand."""
MOST_LOAD_BYTES = 1_900_000
"""Compressed loads of all runs together: the page stays below 5 MB."""


def render(traces: list[Trace]) -> str:
    """The page of one run, or of two runs of one model side by side."""
    runs, loads = [], []
    for index, trace in enumerate(traces):
        packed, frames = load_codes.pack_within(
            trace.counts_SME, MOST_FRAMES, MOST_LOAD_BYTES // len(traces)
        )
        hottest, coldest = summary.hottest_and_coldest(trace)
        loads.append(base64.b64encode(packed).decode())
        runs.append(
            {
                "mark": "AB"[index],
                "trace": trace,
                "folder": trace.path.parent.resolve().name,
                "cards": summary.cards(trace, hottest[0]),
                "tables": [("Hottest experts", hottest), ("Coldest experts", coldest)],
                "frames": trace.steps[frames].tolist(),
                "thinned": len(frames) < len(trace.steps),
            }
        )
    charts = figures.charts(traces)
    data = {
        "lowestOctave": load_codes.LOWEST_OCTAVE,
        "levelsPerOctave": load_codes.LEVELS_PER_OCTAVE,
        "dead": figures.DEAD,
        "colorRange": figures.COLOR_RANGE,
        "runs": [
            {
                "frames": run["frames"],
                "layers": run["trace"].layers,
                "numExperts": run["trace"].info.num_experts,
                "heatmap": json.loads(figures.heatmap(run["trace"]).to_json()),
            }
            for run in runs
        ],
        "course": json.loads(figures.course(traces).to_json()),
        "charts": [[json.loads(figure.to_json()) for figure in chart.figures] for chart in charts],
    }
    return _template().render(
        runs=runs,
        charts=charts,
        loads=loads,
        load_colors=figures.LOAD_COLORS,
        dead_color=figures.DEAD_COLOR,
        data=packed_text(json.dumps(data)),
        plotly=packed_text(get_plotlyjs()),
    )


def packed_text(text: str) -> str:
    """Deflated and base64: plotly alone is 4.8 MB otherwise."""
    return base64.b64encode(zlib.compress(text.encode(), level=9)).decode()


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("titan_moe_lb", "report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("page.html.jinja")
