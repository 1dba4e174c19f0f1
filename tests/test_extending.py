"""docs/extending.md: every example runs as it stands there, and does what it says."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from tests import doc_examples
from tests.train_jobs import train
from titan_moe_lb.errors import JobError
from titan_moe_lb.job import job_config, model_help
from titan_moe_lb.traces.trace import read_trace

TINY = ["--module", "deepseek_v3", "--config", "deepseek_v3_tiny", "--training.steps=2"]


def train_with(example: str, arguments: list[str]) -> list[dict[str, float]]:
    """Train a job in a process that has imported the example. Runs on every rank."""
    with doc_examples.imported(example):
        return train(arguments)


@pytest.mark.parametrize("name", doc_examples.names())
def test_every_example_can_be_imported(name):
    with doc_examples.imported(name) as module:
        assert module.__name__ == name


# ---- A forced strategy


def test_strategy_has_the_load_that_it_promises(ranks, tmp_path):
    """8 experts, the first 4 cold: with EP 2, rank 1 has all the load."""
    flags = [
        "--parallelism.expert_parallel_degree=2",
        "--training.local_batch_size=4",
        f"--dump_folder={tmp_path}",
        '--model.forced_routing={type = "cold_experts", num_cold = 4}',
    ]
    logged, _ = ranks.run(2, train_with, "cold_experts", [*TINY, *flags])
    trace = read_trace(tmp_path)
    assert (trace.counts_SME[..., :4] == 0).all()
    assert (trace.counts_SME[..., 4:] == 8 * 128 * 2 // 4).all()
    assert trace.info.forced_routing == "cold_experts (num_cold 4)"
    assert logged[0]["moe/max_overload_factor"] == 2


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("num_cold = 7", r"num_cold is 7; it must be in \[0, 6\]"),
        ("cold = 4", "did you mean 'num_cold'"),
    ],
)
def test_strategy_of_a_bad_job(monkeypatch, table, message):
    monkeypatch.setenv("WORLD_SIZE", "1")
    flags = [f'--model.forced_routing={{type = "cold_experts", {table}}}']
    with doc_examples.imported("cold_experts"), pytest.raises(JobError, match=message):
        job_config.load([*TINY, *flags])


def test_strategy_is_in_the_help():
    shown = io.StringIO()
    with doc_examples.imported("cold_experts"):
        model_help.show("deepseek_v3", Console(file=shown, width=120))
    assert 'type = "cold_experts": No token goes to the first' in shown.getvalue()
    assert "Experts without load." in shown.getvalue()


# ---- A model


def test_model_trains(ranks):
    flags = ["--module", "my_model", "--training.steps=2", "--training.seq_len=64"]
    small = ["--training.local_batch_size=2", "--parallelism.expert_parallel_degree=2"]
    losses = ['--model.aux_losses=[{type = "z_loss", weight = 1e-3}]']
    own, _ = ranks.run(2, train_with, "my_model", [*flags, *small])
    other, _ = ranks.run(2, train_with, "my_model", [*flags, *small, *losses])
    assert own[1]["moe/global_load_balancing_loss"] > 0.9
    assert "moe/z_loss" in other[1]
    assert "moe/global_load_balancing_loss" not in other[1]
