"""Time and memory of the commands that read a long trace.

    python -m benchmarks.long_trace

Writes the trace of a run with 15,625 logged steps of 64 MoE layers with 64 experts: a million
layer-steps. Starts each command on it, and prints its seconds, CPU seconds and resident memory.
The trace repeats the counts of 64 steps. This does not shrink the file, because each record is
compressed by itself.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import tyro

from tests.support.synthetic_trace import run_info, step_loads
from titan_moe_lb.traces.trace import FILE_NAME, TraceWriter

COMMANDS = ("report", "diagnose")


@dataclass
class Arguments:
    """Flags of the benchmark."""

    steps: int = 15_625
    layers: int = 64
    experts: int = 64


def write_trace(folder: Path, arguments: Arguments) -> None:
    """Write a trace whose micro-batch counts are an eighth of the global batch."""
    info = run_info(arguments.layers, arguments.experts, top_k=8)
    loads = [
        dataclasses.replace(load, micro_batch_counts_ME=load.counts_ME // 8)
        for load in step_loads(info, 64)
    ]
    writer = TraceWriter(folder, info)
    for step in range(arguments.steps):
        writer.write(step + 1, loads[step % len(loads)])
    writer.close()


def main() -> None:
    """Write the trace, and measure each command."""
    arguments = tyro.cli(Arguments)
    with TemporaryDirectory(prefix="titan_moe_lb-long-trace-") as folder:
        write_trace(Path(folder), arguments)
        size = Path(folder, FILE_NAME).stat().st_size
        print(f"{arguments.steps * arguments.layers:,} layer-steps, {size / 1e6:.0f} MB")
        for command in COMMANDS:
            started = time.perf_counter()
            words = [sys.executable, "-m", "titan_moe_lb.cli", command, folder]
            process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
            _pid, status, used = os.wait4(process.pid, 0)
            assert status == 0
            print(
                f"{command:10} {time.perf_counter() - started:6.1f} s  "
                f"CPU {used.ru_utime + used.ru_stime:6.1f} s  {used.ru_maxrss / 2**20:5.2f} GiB",
                flush=True,
            )


if __name__ == "__main__":
    main()
