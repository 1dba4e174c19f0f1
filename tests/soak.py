"""A long run of the tiny model with everything on: memory, files and the time of a step stay flat.

python -m tests.soak [--steps 3000]
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil
import tyro

import tests.gpus  # noqa: F401
from tests import rank_pool
from tests.rank_pool import RankPool
from tests.train_jobs import train_config
from titan_moe_lb.job import job_config
from titan_moe_lb.telemetry.metrics import LoadBalanceMetricsProcessor
from titan_moe_lb.traces.trace import FILE_NAME, read_trace

RANKS = 2
MOST_MIB_PER_100_STEPS = 1.0
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
    "--debug.seed=1",
    "--debug.no-enable-structured-logging",
)


@dataclass
class Arguments:
    steps: int = 3000
    seed: int = 1


def resident_memory(steps: int, folder: str) -> list[int]:
    """Train; returns the bytes that this rank held after every step."""
    job = job_config.load([*JOB, f"--training.steps={steps}", f"--dump_folder={folder}"])
    held: list[int] = []
    process = psutil.Process()
    original = LoadBalanceMetricsProcessor.log

    def log(self, *numbers, **more) -> None:
        original(self, *numbers, **more)
        held.append(process.memory_info().rss)

    LoadBalanceMetricsProcessor.log = log  # type: ignore[method-assign]
    train_config(job.config)
    return held


def slope(values: np.ndarray) -> tuple[float, float]:
    """Per index: of the least-squares line through the medians of 20 equal parts, and its
    standard error. Medians, since a save holds a copy for a moment."""
    parts = np.array_split(values, 20)
    x = np.cumsum([len(part) for part in parts]) - len(values) / 40
    (gradient, _level), covariance = np.polyfit(x, [np.median(part) for part in parts], 1, cov=True)
    return float(gradient), float(np.sqrt(covariance[0, 0]))


def figures(by_rank: list[list[int]], folder: Path) -> dict:
    """What is asked of a soak, after the first fifth of it."""
    trace = read_trace(folder)
    steps = len(trace.steps)
    warm = steps // 5
    memory = [slope(np.array(held[warm:]) / 2**20 * 100) for held in by_rank]
    seconds = trace.step_figures["step_seconds"][warm:]
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
    os.environ["WORLD_SIZE"] = str(RANKS)
    with TemporaryDirectory(prefix="titan_moe_lb-soak-") as folder, RankPool(RANKS) as pool:
        rank_pool.TIMEOUT_SECONDS = 24 * 3600  # it answers at its end
        by_rank = pool.run(RANKS, resident_memory, arguments.steps, folder)
        found = figures(by_rank, Path(folder))
    print(json.dumps(found))
    sys.exit(max(found["mib_per_100_steps"]) >= MOST_MIB_PER_100_STEPS)


if __name__ == "__main__":
    main()
