"""Every job file that fits this machine, trained as its TOML asks, on its model's tiny flavor."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import tomli

from tests.train_jobs import save_seed, train
from titan_moe_lb import toml_tables

CONFIGS = Path(__file__).parent.parent / "configs"
LOSS, NORM = "loss_metrics/global_avg_loss", "grad_norm"
MAX_RANKS = 4


def job_files() -> list[Path]:
    """By model, because the processes of a model are compared with one process."""
    return [
        path
        for path in sorted(CONFIGS.glob("*/*.toml"))
        if tomli.loads(path.read_text())["job"]["ranks"] <= MAX_RANKS
    ]


def tiny(job: dict) -> list[str]:
    """The tiny flavor of the job's model with the job's losses, which are part of a checkpoint."""
    module = job["job"]["module"]
    model = [
        f"--model.{key}={toml_tables.inline(value)}" for key, value in job.get("model", {}).items()
    ]
    return ["--module", module, "--config", f"{module}_tiny", "--training.steps=5", *model]


@pytest.fixture(scope="module")
def single_process(ranks, tmp_path_factory):
    """By model: seed checkpoint folder, and what one process logs from it on the same text."""
    known = {}

    def run(arguments: list[str]):
        key = tuple(arguments)
        if key not in known:
            folder = str(tmp_path_factory.mktemp("seed"))
            ranks.run(1, save_seed, arguments, folder)
            (logged,) = ranks.run(1, train, arguments, seed_folder=folder)
            known[key] = folder, logged
        return known[key]

    return run


@pytest.mark.parametrize("path", job_files(), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_job_file_trains(ranks, single_process, path):
    job = tomli.loads(path.read_text())
    seed_folder, reference = single_process(tiny(job))
    arguments = ["--job-config", str(path), *tiny(job)]
    by_rank = ranks.run(job["job"]["ranks"], train, arguments, seed_folder=seed_folder)

    norms = {logged[0][NORM] for logged in by_rank}
    assert len(norms) == 1, "ranks disagree on the gradient norm"
    losses = [
        [step[LOSS] for step in logged] for logged in by_rank if logged[0][LOSS] > 0
    ]  # a rank without the last pipeline stage reports a negative placeholder
    assert losses and all(len(loss) == 5 and all(map(math.isfinite, loss)) for loss in losses)
    norm, expected = norms.pop(), reference[0][NORM]
    parallelism = job.get("parallelism", {})
    same_text = job.get("training", {}).get("local_batch_size", 8) == 8
    pipeline_alone = all(key.startswith("pipeline") for key in parallelism)
    if pipeline_alone and same_text:
        assert norm == pytest.approx(expected, rel=0.02)
        assert losses[0][0] == pytest.approx(reference[0][LOSS], rel=0.02)
    assert expected / 1.5 < norm < expected * 1.5

    moe = [{k: v for k, v in logged[0].items() if k.startswith("moe/")} for logged in by_rank]
    assert moe[0] and all(metrics == moe[0] for metrics in moe), "ranks disagree on MoE metrics"
    balance = [value for name, value in moe[0].items() if name.endswith("load_balancing_loss")]
    # 1.0 at perfect balance; in the first step the global-batch loss is 1.0 by definition.
    assert balance and all(value == pytest.approx(1.0, abs=0.1) for value in balance)
    assert moe[0]["moe/max_violation"] > 0
