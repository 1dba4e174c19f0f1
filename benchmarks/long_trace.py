"""Time and memory of what writes and reads a long trace.

    python -m benchmarks.long_trace

Writes the trace of a run, 6,000 logged steps of 58 MoE layers with 256 experts by default, and then
a longer one of a smaller model. On each it measures the first step of a resumed run, the last line
of a run and the commands, every one in a process of its own: seconds, CPU seconds, and peak
resident memory. The trace repeats the counts of 16 steps. This does not shrink the file, because
each record is compressed by itself.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import tyro

from tests.support.synthetic_trace import run_info, step_loads
from titan_moe_lb.traces.run_info import RunInfo
from titan_moe_lb.traces.step_load import StepLoad
from titan_moe_lb.traces.trace import (
    FILE_NAME,
    MOST_BYTES,
    TraceReader,
    TraceWriter,
    last_step,
    read_trace,
)

SHAPES = ((6_000, 58, 256), (100_000, 8, 64))
COMMANDS = (("watch", "--once"), ("diagnose",), ("report",))


@dataclasses.dataclass
class Arguments:
    """Flags of the benchmark."""

    shapes: tuple[tuple[int, int, int], ...] = SHAPES
    """Logged steps, layers and experts of each trace."""
    measure: tuple[str, Path] | None = None
    """Part to measure in this process, and the folder of its trace."""


def run(layers: int, experts: int) -> tuple[RunInfo, Iterator[StepLoad]]:
    """Return a run and its loads; micro-batch counts are an eighth of the global batch."""
    info = run_info(layers, experts, top_k=8)
    loads = [
        dataclasses.replace(load, micro_batch_counts_ME=load.counts_ME // 8)
        for load in step_loads(info, 16)
    ]
    return info, itertools.cycle(loads)


def resume(folder: Path) -> Callable[[], object]:
    """Prepare the step that a resumed run writes first: it repeats the last ten."""
    reader = TraceReader(folder)
    reader.skip_to_last(1)
    trace = reader.read()
    load = trace.load(-1)
    writer = TraceWriter(folder, trace.info)
    return lambda: writer.write(int(trace.steps[-1]) - 9, load)


PARTS = {
    "resume, first step": resume,
    "last line of a run": lambda folder: lambda: last_step(folder),
    "loads for plan": lambda folder: (
        lambda: read_trace(folder, micro_batches=True, most_bytes=MOST_BYTES)
    ),
}
"""Functions that prepare a part in its process, and return what is timed."""


def measured(*words: str) -> None:
    """Run a command in a process of its own; print seconds, CPU seconds and peak memory."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", *words], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _pid, status, used = os.wait4(process.pid, 0)
    assert status == 0, words
    seconds, cpu = time.perf_counter() - started, used.ru_utime + used.ru_stime
    is_part = words[0] == "benchmarks.long_trace"
    if is_part:
        seconds, cpu = map(float, output.split())
    name = words[2] if is_part else words[1]
    print(
        f"{name:20} {seconds:8.3f} s  CPU {cpu:7.3f} s  {used.ru_maxrss / 2**10:6.0f} MiB",
        flush=True,
    )


def main() -> None:
    """Write the traces, and measure each command on them."""
    arguments = tyro.cli(Arguments)
    if arguments.measure:
        name, folder = arguments.measure
        part = PARTS[name](folder)
        started, cpu = time.perf_counter(), time.process_time()
        part()
        print(time.perf_counter() - started, time.process_time() - cpu)
        return
    for steps, layers, experts in arguments.shapes:
        with TemporaryDirectory(prefix="titan_moe_lb-long-trace-") as folder:
            (info, loads), cpu = run(layers, experts), time.process_time()
            writer = TraceWriter(folder, info)
            for step in range(steps):
                writer.write(step + 1, next(loads))
            writer.close()
            cpu, size = time.process_time() - cpu, Path(folder, FILE_NAME).stat().st_size
            print(
                f"{steps:,} steps x {layers} layers x {experts} experts: {size / 1e6:,.0f} MB, "
                f"{size / steps:,.0f} bytes and {1e3 * cpu / steps:.2f} ms of CPU a step"
            )
            for name in PARTS:
                measured("benchmarks.long_trace", "--measure", name, folder)
            for command, *flags in COMMANDS:
                measured("titan_moe_lb.cli", command, folder, *flags)


if __name__ == "__main__":
    main()
