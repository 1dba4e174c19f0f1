"""HTML page of the report, which needs neither a network nor the trace."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

from titan_moe_lb.commands.diagnose.examined_run import ExaminedRun
from titan_moe_lb.commands.diagnose.runs_table import runs_table
from titan_moe_lb.commands.report import load_codes, load_map, summary
from titan_moe_lb.commands.report.charts import charts
from titan_moe_lb.pages import html_page
from titan_moe_lb.pages.charts import MARKS
from titan_moe_lb.traces.run_names import run_names
from titan_moe_lb.traces.trace import Trace

MOST_FRAMES = 400
"""Largest number of steps of the slider; more would be too close to select by hand."""
MOST_PAGE_BYTES = 4_950_000
"""Largest size of the page; it embeds fewer steps to stay below."""
_MARKUP_BYTES = 60_000


def render(traces: list[Trace], notes: Sequence[str] = ()) -> str:
    """Render the page of one run, or of several runs.

    Args:
        traces: the runs.
        notes: sentences about runs that the page leaves out.
    """
    shown = charts(traces)
    drawings = html_page.drawings(shown)
    rest = MOST_PAGE_BYTES - _MARKUP_BYTES - len(drawings) - len(html_page.packed_plotly())
    most_load_bytes = rest * 3 // 4 // len(traces)  # base64 encodes 3 bytes as 4
    names = run_names([trace.info for trace in traces], [trace.path for trace in traces])
    runs = [
        _run(mark, name, trace, most_load_bytes)
        for mark, name, trace in zip(MARKS, names.names, traces, strict=False)
    ]
    frames = max((run["frames"] for run in runs), key=lambda frames: frames[-1])
    data = {
        "lowestOctave": load_codes.LOWEST_OCTAVE,
        "levelsPerOctave": load_codes.LEVELS_PER_OCTAVE,
        "dead": load_map.DEAD,
        "colorRange": load_map.COLOR_RANGE,
        "course": html_page.plain(load_map.course(traces)),
        "frames": frames,
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
        table=runs_table([run["examined"] for run in runs], names, MARKS),
        notes=notes,
        layers=sorted({layer for trace in traces for layer in trace.layers}),
        most_experts=max(trace.info.num_experts for trace in traces),
        num_frames=len(frames),
        charts=shown,
        data=html_page.packed(json.dumps(data)),
        drawings=drawings,
    )


def _run(mark: str, name: str, trace: Trace, most_load_bytes: int) -> dict[str, Any]:
    """Compute the template variables of one run."""
    loads, frames = load_codes.pack_within(trace.counts_SME, MOST_FRAMES, most_load_bytes)
    hottest, coldest = summary.hottest_and_coldest(trace)
    examined = ExaminedRun.of(trace)
    return {
        "mark": mark,
        "trace": trace,
        "name": name,
        "examined": examined,
        "findings": [
            (finding, summary.places(trace, finding)) for finding in examined.diagnosis.findings
        ],
        "facts": summary.facts(trace),
        "cards": summary.cards(trace, hottest[0]),
        "hottest": summary.hottest_now(trace),
        "tables": [("Hottest experts", hottest), ("Coldest experts", coldest)],
        "frames": trace.steps[frames].tolist(),
        "thinned": len(frames) < len(trace.steps),
        "loads": base64.b64encode(loads).decode(),
    }
