"""How long the commands that read a long trace take: ``python -m benchmarks.long_trace``.

Writes the trace of a run of 15,625 logged steps of 64 MoE layers with 64 experts, a million
layer-steps, and starts each command on it; prints its seconds, its CPU seconds and its
resident memory. The counts of 64 steps are repeated: a record is compressed by itself, so that
it is no smaller for that.
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
    steps: int = 15_625
    layers: int = 64
    experts: int = 64


def write_trace(folder: Path, arguments: Arguments) -> None:
    """One micro-batch of eight in a step, as the trace of a run has it."""
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
