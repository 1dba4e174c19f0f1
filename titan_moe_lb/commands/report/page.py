"""HTML page of the report, which needs neither a network nor the trace."""

from __future__ import annotations

import base64
import json
from typing import Any

from titan_moe_lb.commands.report import load_codes, load_map, summary
from titan_moe_lb.commands.report.charts import charts
from titan_moe_lb.commands.report.run_names import MARKS, run_names
from titan_moe_lb.pages import html_page
from titan_moe_lb.traces.trace import Trace

MOST_FRAMES = 400
"""Largest number of steps of the slider; more would be too close to select by hand."""
MOST_PAGE_BYTES = 4_950_000
"""Largest size of the page; it embeds fewer steps to stay below."""
_MARKUP_BYTES = 60_000


def render(traces: list[Trace]) -> str:
    """Render the page of one run, or of several runs of one model."""
    shown = charts(traces)
    drawings = html_page.drawings(shown)
    rest = MOST_PAGE_BYTES - _MARKUP_BYTES - len(drawings) - len(html_page.packed_plotly())
    most_load_bytes = rest * 3 // 4 // len(traces)  # base64 encodes 3 bytes as 4
    names = run_names([trace.path for trace in traces])
    runs = [
        _run(mark, name, trace, most_load_bytes)
        for mark, name, trace in zip(MARKS, names, traces, strict=False)
    ]
    data = {
        "lowestOctave": load_codes.LOWEST_OCTAVE,
        "levelsPerOctave": load_codes.LEVELS_PER_OCTAVE,
        "dead": load_map.DEAD,
        "colorRange": load_map.COLOR_RANGE,
        "course": html_page.plain(load_map.course(traces)),
        "runs": [
            {
                "frames": run["frames"],
                "layers": trace.layers,
                "numExperts": trace.info.num_experts,
                "heatmap": html_page.plain(load_map.heatmap(trace)),
            }
            for run, trace in zip(runs, traces, strict=True)
        ],
    }
    return html_page.render(
        "commands/report/page.html.jinja",
        runs=runs,
        charts=shown,
        data=html_page.packed(json.dumps(data)),
        drawings=drawings,
    )


def _run(mark: str, name: str, trace: Trace, most_load_bytes: int) -> dict[str, Any]:
    """Compute the template variables of one run."""
    loads, frames = load_codes.pack_within(trace.counts_SME, MOST_FRAMES, most_load_bytes)
    hottest, coldest = summary.hottest_and_coldest(trace)
    return {
        "mark": mark,
        "trace": trace,
        "name": name,
        "facts": summary.facts(trace),
        "cards": summary.cards(trace, hottest[0]),
        "hottest": summary.hottest_now(trace),
        "tables": [("Hottest experts", hottest), ("Coldest experts", coldest)],
        "frames": trace.steps[frames].tolist(),
        "thinned": len(frames) < len(trace.steps),
        "loads": base64.b64encode(loads).decode(),
    }
