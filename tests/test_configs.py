"""Every job file of DeepSeek-V3, trained as its TOML asks, on the tiny flavor."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import tomli

from tests.train_jobs import save_seed, train

CONFIGS = Path(__file__).parent.parent / "configs" / "deepseek_v3"
LOSS, NORM = "loss_metrics/global_avg_loss", "grad_norm"
TINY = ["--module", "deepseek_v3", "--config", "deepseek_v3_tiny", "--training.steps=5"]


@pytest.fixture(scope="module")
def single_process(ranks, tmp_path_factory):
    """Seed checkpoint folder, and what one process logs from it on the same text."""
    folder = str(tmp_path_factory.mktemp("seed"))
    ranks.run(1, save_seed, TINY, folder)
    (logged,) = ranks.run(1, train, TINY, seed_folder=folder)
    return folder, logged


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in CONFIGS.glob("*.toml") if path.stem != "671b")
)
def test_job_file_trains(ranks, single_process, name):
    seed_folder, reference = single_process
    path = CONFIGS / f"{name}.toml"
    job = tomli.loads(path.read_text())
    arguments = ["--job-config", str(path), *TINY]
    by_rank = ranks.run(job["job"]["ranks"], train, arguments, seed_folder=seed_folder)

    norms = {logged[0][NORM] for logged in by_rank}
    assert len(norms) == 1, "ranks disagree on the gradient norm"
    losses = [
        [step[LOSS] for step in logged] for logged in by_rank if logged[0][LOSS] > 0
    ]  # a rank without the last pipeline stage reports a negative placeholder
    assert losses and all(len(loss) == 5 and all(map(math.isfinite, loss)) for loss in losses)
    norm, expected = norms.pop(), reference[0][NORM]
    parallelism = job.get("parallelism", {})
    if parallelism.keys() <= {key for key in parallelism if key.startswith("pipeline")}:
        assert norm == pytest.approx(expected, rel=0.02)
        assert losses[0][0] == pytest.approx(reference[0][LOSS], rel=0.02)
    assert expected / 1.5 < norm < expected * 1.5

    moe = [{k: v for k, v in logged[0].items() if k.startswith("moe/")} for logged in by_rank]
    assert moe[0] and all(metrics == moe[0] for metrics in moe), "ranks disagree on MoE metrics"
    assert moe[0]["moe/seq_load_balancing_loss"] == pytest.approx(1.0, abs=0.1)
    assert moe[0]["moe/max_violation"] > 0
