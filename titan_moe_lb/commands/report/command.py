"""The command ``titan-moe-lb report``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from titan_moe_lb.commands.report.page import render
from titan_moe_lb.commands.report.run_names import MARKS
from titan_moe_lb.errors import JobError
from titan_moe_lb.pages import output_file
from titan_moe_lb.traces.trace import MOST_BYTES, read_trace, trace_file


def write_report(run_dir: Path, compare: Sequence[Path] = (), output: Path | None = None) -> str:
    """Write the page of one run, or of several runs of one model.

    Args:
        run_dir: folder of the run, or its trace.
        compare: folders or traces of further runs.
        output: file of the page; default: ``report.html`` beside the trace of ``run_dir``, or
            ``compare.html`` with further runs.

    Returns:
        A line with the file, and a line for each damaged stretch of a trace.

    Raises:
        JobError: a trace cannot be read, the models differ, there are too many runs, or the page
            cannot be written.
    """
    folders = (run_dir, *compare)
    if len(folders) > len(MARKS):
        raise JobError(f"--compare: a page shows at most {len(MARKS)} runs, not {len(folders)}")
    files = [trace_file(folder) for folder in folders]
    if output is None:
        output = files[0].with_name("compare.html" if compare else "report.html")
    if files[0].exists():  # otherwise read_trace reports that the run is missing
        output_file.check(output, inputs=files)
    traces = [read_trace(folder, most_bytes=MOST_BYTES) for folder in folders]
    for other in traces[1:]:
        traces[0].info.require_same_model(other.info, str(traces[0].path), str(other.path))
    output_file.write(render(traces), output)
    notes = [sentence for trace in traces for sentence in trace.damage]
    steps = ", ".join(f"{len(trace.steps)} steps" for trace in traces)
    return "\n".join([f"{output}: {steps}, {output.stat().st_size / 1e6:.1f} MB", *notes])
