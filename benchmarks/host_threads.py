"""Wait settings of OpenMP's threads, compared in jobs of one process.

    python -m benchmarks.host_threads [ROUNDS]

Starts one process for each setting. The processes take turns, so that other work on the machine
disturbs all of them alike. Each steps a small model of an MoE layer's size (2,048 tokens, width
256, many short operators). Prints median and worst seconds of a step, and its CPU seconds.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import time

import torch

SETTINGS = {
    "as torch does": {},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "short spin": {"GOMP_SPINCOUNT": "10000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
KEYS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
LAYERS, TOKENS, DIM, HEADS = 4, 2048, 256, 16


def main() -> None:
    """Let the processes take turns, and print the times of each setting."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    clean = {name: value for name, value in os.environ.items() if name not in KEYS}
    command = [sys.executable, "-m", "benchmarks.host_threads", "--worker"]
    workers = {
        name: subprocess.Popen(
            command, env=clean | setting, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for name, setting in SETTINGS.items()
    }
    steps: dict[str, list[tuple[float, float]]] = {name: [] for name in workers}
    for _round in range(rounds):
        for name, worker in workers.items():
            assert worker.stdin and worker.stdout
            worker.stdin.write("step\n")
            worker.stdin.flush()
            wall, cpu = map(float, worker.stdout.readline().split())
            steps[name].append((wall, cpu))
    for name, worker in workers.items():
        worker.communicate()
        wall, cpu = zip(*steps[name][2:], strict=True)
        print(
            f"{name:15} median {statistics.median(wall):7.3f} s  worst {max(wall):7.3f} s  "
            f"CPU {statistics.median(cpu):6.3f} s"
        )


def work() -> None:
    """Take one step for each line of standard input, and print its wall and CPU seconds."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(DIM, HEADS, 4 * DIM, 0.0, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    tokens = torch.randn(TOKENS // 256, 256, DIM)
    for _line in sys.stdin:
        started, before = time.perf_counter(), _cpu()
        model(tokens).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        print(time.perf_counter() - started, _cpu() - before, flush=True)


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    work() if sys.argv[1:] == ["--worker"] else main()
