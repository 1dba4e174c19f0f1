"""Soak: a long run of the tiny model with everything on.

Memory, files and the time of a step must stay flat.

    python -m tests.soak [--steps 3000]
"""

from __future__ import annotations

import ctypes
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil
import tyro

import tests.support.gpus  # noqa: F401
from tests.support import rank_pool
from tests.support.rank_pool import RankPool
from titan_moe_lb.run.train import trainer_config
from titan_moe_lb.telemetry.metrics_processor import LoadBalanceMetricsProcessor
from titan_moe_lb.traces.trace import FILE_NAME, read_trace

RANKS = 2
MOST_MIB_PER_100_STEPS = 1.0
MEASURED_EVERY = 25
JOB = (
    "--config=deepseek_v3_tiny",
    "--model.aux_losses=[{type='sequence_wise', weight=1e-3}, {type='global_batch', weight=1e-3}, "
    "{type='z_loss', weight=1e-5}]",
    "--model.expert_bias={type='quantile'}",
    f"--parallelism.data_parallel_shard_degree={RANKS}",
    f"--parallelism.expert_parallel_degree={RANKS}",
    "--training.local_batch_size=2",
    "--metrics.log_freq=1",
    "--metrics.enable_tensorboard",
    "--checkpoint.enable",
    "--checkpoint.interval=250",
    "--checkpoint.keep_latest_k=2",
    # torch's flight recorder keeps the last 20,000 collectives, about 4 MiB per 100 steps: of
    # fewer it is full in the first fifth of the run, and in it what is not bounded would show.
    "--comm.trace_buf_size=2000",
    "--debug.seed=1",
    "--debug.no-enable-structured-logging",
)


@dataclass
class Arguments:
    steps: int = 3000


def held_memory(steps: int, folder: str) -> list[int]:
    """Train; return the bytes that this rank held after every 25th step.

    malloc first gives back freed memory. How much it keeps depends on the order of allocations, and
    settles only after thousands of steps.
    """
    config = trainer_config(*JOB, f"--training.steps={steps}", f"--dump_folder={folder}")
    held: list[int] = []
    process, libc = psutil.Process(), ctypes.CDLL(None)
    original = LoadBalanceMetricsProcessor.log

    def log(self, step: int, *numbers, **more) -> None:
        original(self, step, *numbers, **more)
        if step % MEASURED_EVERY == 0:
            libc.malloc_trim(0)
            held.append(process.memory_info().rss)

    LoadBalanceMetricsProcessor.log = log  # type: ignore[method-assign]
    trainer = config.build()
    trainer.train()
    trainer.close()
    return held


def slope(values: np.ndarray) -> tuple[float, float]:
    """Slope per index, and its standard error.

    The line is the least-squares fit through the medians of 20 equal parts. Medians are robust
    against a save, which holds a copy for a moment.
    """
    parts = np.array_split(values, 20)
    x = np.cumsum([len(part) for part in parts]) - len(values) / 40
    (gradient, _level), covariance = np.polyfit(x, [np.median(part) for part in parts], 1, cov=True)
    return float(gradient), float(np.sqrt(covariance[0, 0]))


def figures(by_rank: list[list[int]], folder: Path) -> dict:
    """Results that a soak must meet, after its first fifth."""
    trace = read_trace(folder)
    steps = len(trace.steps)
    warm = steps // 5
    per_100_steps = 100 / MEASURED_EVERY / 2**20
    memory = [slope(np.array(held[warm // MEASURED_EVERY :]) * per_100_steps) for held in by_rank]
    seconds = trace.step_columns["step_seconds"][warm:]
    per_step, error = slope(seconds)
    size = (folder / FILE_NAME).stat().st_size / steps
    return {
        "steps": steps,
        "mib_per_100_steps": [round(each, 3) for each, _error in memory],
        "standard_error": [round(error, 3) for _each, error in memory],
        "step_seconds": float(np.median(seconds)),
        "step_seconds_growth_percent": per_step * len(seconds) / float(np.median(seconds)) * 100,
        "standard_error_percent": error * len(seconds) / float(np.median(seconds)) * 100,
        "trace_bytes_per_step": size,
        "checkpoints": len(list((folder / "checkpoint").glob("step-*"))),
    }


def main() -> None:
    arguments = tyro.cli(Arguments)
    with TemporaryDirectory(prefix="titan_moe_lb-soak-") as folder, RankPool(RANKS) as pool:
        rank_pool.TIMEOUT_SECONDS = 24 * 3600  # it answers at its end
        by_rank = pool.run(RANKS, held_memory, arguments.steps, folder)
        found = figures(by_rank, Path(folder))
    print(json.dumps(found))
    sys.exit(max(found["mib_per_100_steps"]) >= MOST_MIB_PER_100_STEPS)


if __name__ == "__main__":
    main()
