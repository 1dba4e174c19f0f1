"""The command ``titan-moe-lb report``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from titan_moe_lb.commands.report.page import render
from titan_moe_lb.errors import JobError
from titan_moe_lb.pages import output_file
from titan_moe_lb.pages.charts import MARKS
from titan_moe_lb.traces.named_runs import NamedRuns
from titan_moe_lb.traces.trace import FILE_NAME, MOST_BYTES


def write_report(run_dirs: Sequence[Path], output: Path | None = None) -> int:
    """Write the page of one run, or of several runs, and print its path.

    Print a line for each run that is left out, and for each damaged stretch of a trace.

    Args:
        run_dirs: runs, folders of runs, and patterns; see :meth:`NamedRuns.of`.
        output: file of the page. Default: ``report.html`` beside the trace; for several runs
            ``compare.html`` in the first folder of ``run_dirs``, or beside the first trace.

    Returns:
        Exit status: 1 if one of several runs cannot be read, else 0.

    Raises:
        JobError: no run is found, none can be read, there are too many, or the page cannot be
            written.
    """
    found = NamedRuns.of(run_dirs)
    if len(found.files) > len(MARKS):
        raise JobError(
            f"a page shows at most {len(MARKS)} runs, not {len(found.files)}: name fewer, or print "
            "their table with titan-moe-lb diagnose"
        )
    if output is None:
        output = _page(run_dirs[0], found)
    output_file.check(output, inputs=found.files)
    traces = list(found.traces(most_bytes=MOST_BYTES // len(found.files)))
    output_file.write(render(traces, found.notes), output)
    content = f"{len(traces)} runs" if len(traces) > 1 else f"{len(traces[0].steps)} steps"
    print(f"{output}: {content}, {output.stat().st_size / 1e6:.1f} MB")
    damage = [f"{trace.path}: {sentence}" for trace in traces for sentence in trace.damage]
    for line in (*found.notes, *damage):
        print(line)
    return int(bool(found.left_out))


def _page(first: Path, found: NamedRuns) -> Path:
    if len(found.files) == 1:
        return found.files[0].with_name("report.html")
    is_folder_of_runs = first.is_dir() and not (first / FILE_NAME).is_file()
    return (first if is_folder_of_runs else found.files[0].parent) / "compare.html"
