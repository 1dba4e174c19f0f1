"""``titan-moe-lb report``."""

from __future__ import annotations

from pathlib import Path

from titan_moe_lb.pages import html_page
from titan_moe_lb.report.page import render
from titan_moe_lb.traces.trace import read_trace


def write_report(run_dir: Path, compare: Path | None = None, output: Path | None = None) -> str:
    """Write the page of one run, or of two side by side.

    Args:
        run_dir: folder of the run, or its trace.
        compare: the same of a second run of the same model.
        output: the page; default: ``report.html`` beside the trace.

    Returns:
        What to tell the user: the file, and what the trace lacked.

    Raises:
        JobError: a trace cannot be read, the models differ, the page cannot be written.
    """
    traces = [read_trace(folder) for folder in (run_dir, compare) if folder is not None]
    for other in traces[1:]:
        traces[0].info.require_same_model(other.info, str(traces[0].path), str(other.path))
    output = traces[0].path.with_name("report.html") if output is None else output
    page = render(traces)
    html_page.write(page, output)
    notes = [sentence for trace in traces for sentence in trace.damage]
    steps = " and ".join(f"{len(trace.steps)} steps" for trace in traces)
    return "\n".join([f"{output}: {steps}, {len(page.encode()) / 1e6:.1f} MB", *notes])
