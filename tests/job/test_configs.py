"""Tests of the job files: each that fits this machine trains, with its model's tiny flavor."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import tomli
from torchtitan.models.common.moe import MoE

from tests.support.train_jobs import save_seed, train
from titan_moe_lb import toml_tables
from titan_moe_lb.traces.run_info import RunInfo
from titan_moe_lb.traces.trace import read_trace

CONFIGS = Path(__file__).parents[2] / "configs"
LOSS, NORM = "loss_metrics/global_avg_loss", "grad_norm"
MAX_RANKS = 4
STEPS = 3
FAST = "--optimizer.param_groups.0.optimizer_kwargs.lr=3e-3"
"""Learning rate that changes the weights within three steps."""


def job_files() -> list[Path]:
    """List the job files by model, because each model has one reference process."""
    return [
        path
        for path in sorted(CONFIGS.glob("*/*.toml"))
        if tomli.loads(path.read_text())["job"]["ranks"] <= MAX_RANKS
    ]


def tiny(job: dict) -> list[str]:
    """Configure the tiny flavor of the job's model with its losses, which a checkpoint contains."""
    module = job["job"]["module"]
    model = [
        f"--model.{key}={toml_tables.inline(value)}" for key, value in job.get("model", {}).items()
    ]
    return [
        "--module",
        module,
        "--config",
        f"{module}_tiny",
        f"--training.steps={STEPS}",
        FAST,
        *model,
    ]


def graphs(job: dict) -> list[str]:
    """Compile blocks without kernels; test_parity.py runs the kernels."""
    return ["--compile.backend=aot_eager"] if job.get("compile", {}).get("enable") else []


@pytest.fixture(scope="module")
def data_parallel(ranks, tmp_path_factory):
    """Folder of the seed checkpoint, and the log of FSDP alone from it on the same text, by
    degree."""
    seeds, known = {}, {}

    def run(arguments: list[str], degree: int, batch: int):
        model, key = tuple(arguments), (*arguments, degree, batch)
        if model not in seeds:
            seeds[model] = str(tmp_path_factory.mktemp("seed"))
            ranks.run(1, save_seed, arguments, seeds[model])
        if key not in known:
            cut = [f"--training.local_batch_size={batch}"]
            cut += [f"--parallelism.data_parallel_shard_degree={degree}"]
            known[key] = ranks.run(degree, train, [*arguments, *cut], seed_folder=seeds[model])[0]
        return seeds[model], known[key]

    return run


@pytest.mark.parametrize("path", job_files(), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_job_file_trains(ranks, data_parallel, path, tmp_path):
    job = tomli.loads(path.read_text())
    ranks.need(job["job"]["ranks"])
    degrees, batch = degrees_of(job), local_batch(job)
    degree = degrees["dp_replicate"] * degrees["dp_shard"]
    seed_folder, expected = data_parallel(tiny(job), degree, batch)
    arguments = ["--job-config", str(path), *tiny(job), *graphs(job), f"--dump_folder={tmp_path}"]
    by_rank = ranks.run(job["job"]["ranks"], train, arguments, seed_folder=seed_folder)

    # A rank without the last pipeline stage reports a negative placeholder.
    seeing = [logged for logged in by_rank if logged[0][LOSS] > 0]
    assert seeing and all(len(logged) == STEPS for logged in by_rank)
    for step, reference in enumerate(expected):
        (norm,) = {logged[step][NORM] for logged in by_rank}
        assert norm == pytest.approx(reference[NORM], rel=0.02)
        for logged in seeing:
            assert logged[step][LOSS] == pytest.approx(reference[LOSS], rel=1e-3)
    assert expected[-1][LOSS] < expected[0][LOSS]

    moe = [[moe_metrics(step) for step in logged] for logged in by_rank]
    assert all(metrics == moe[0] for metrics in moe), "ranks disagree on MoE metrics"
    balance = [value for name, value in moe[0][0].items() if name.endswith("balancing_loss")]
    # 1.0 at perfect balance; in the first step the global-batch loss is 1.0 by definition.
    assert balance and all(value == pytest.approx(1.0, abs=0.1) for value in balance)

    trace = read_trace(tmp_path)
    check_layout(trace.info, job)
    tokens = batch * degree * trace.info.seq_len
    assert (trace.counts_SME.sum(axis=2) == tokens * trace.info.top_k).all()
    violation_SM = trace.counts_SME.max(axis=2) / trace.counts_SME.mean(axis=2) - 1
    assert [step["moe/max_violation"] for step in moe[0]] == pytest.approx(
        violation_SM.mean(axis=1)
    )
    assert len(trace.layers) == num_moe_layers(job["job"]["module"])


def moe_metrics(step: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in step.items() if name.startswith("moe/")}


def num_moe_layers(module: str) -> int:
    spec = importlib.import_module(f"model_registry.{module}").model_registry("tiny")
    return len(list(spec.model.traverse(MoE.Config)))


def degrees_of(job: dict) -> dict[str, int]:
    """Degrees in the TOML, by their names in a trace's run info."""
    keys = {
        "pp": "pipeline_parallel",
        "dp_replicate": "data_parallel_replicate",
        "dp_shard": "data_parallel_shard",
        "cp": "context_parallel",
        "tp": "tensor_parallel",
        "ep": "expert_parallel",
    }
    table = job.get("parallelism", {})
    return {name: table.get(f"{key}_degree", 1) for name, key in keys.items()}


def local_batch(job: dict) -> int:
    """Local batch size in the TOML, or of the debug and tiny flavors."""
    return job.get("training", {}).get("local_batch_size", 8)


def check_layout(info: RunInfo, job: dict) -> None:
    """Check that the layout of the run is that of the TOML."""
    degrees = degrees_of(job)
    assert {name: getattr(info, name) for name in degrees} == degrees
    assert info.world_size == job["job"]["ranks"]
    assert info.schedule == job.get("parallelism", {}).get("pipeline_parallel_schedule")
    assert info.local_batch_size == local_batch(job)
    assert info.global_batch_size == local_batch(job) * info.dp_replicate * info.dp_shard
