"""Faults planted in runs that really train, and runs that are well."""

from __future__ import annotations

import pytest
import torch

from tests.train_jobs import train_config
from titan_moe_lb.diagnose.checks import findings
from titan_moe_lb.job import job_config
from titan_moe_lb.router import routers_of
from titan_moe_lb.traces.trace import read_trace

DEEPSEEK = ["--module=deepseek_v3", "--config=deepseek_v3_tiny"]
QWEN = ["--module=qwen3", "--config=qwen3_tiny"]
SMALL = ["--training.steps=40", "--training.seq_len=64", "--training.local_batch_size=8"]
EP2 = ["--parallelism.data_parallel_shard_degree=2", "--parallelism.expert_parallel_degree=2"]
NO_LOSS = "--model.aux_losses=[]"
LEARNING_RATE = "--optimizer.param_groups.0.optimizer_kwargs.lr="


def run(arguments: list[str], *, zero_gates: bool = False) -> None:
    """One rank of a job."""

    def prepare(trainer) -> None:
        if zero_gates:
            with torch.no_grad():
                for router in routers_of(trainer.model_parts):
                    router.gate.weight.zero_()

    config = job_config.load(["--debug.no-enable-structured-logging", *SMALL, *arguments]).config
    train_config(config, prepare=prepare)


def diagnosed(ranks, folder, arguments: list[str], num_ranks: int = 1, **options) -> list[str]:
    ranks.run(num_ranks, run, [*arguments, f"--dump_folder={folder}"], **options)
    return [finding.kind for finding in findings(read_trace(folder))]


PLANTED = {
    "hot_rank": (
        2,
        [*DEEPSEEK, *EP2, '--model.forced_routing={type = "hot_rank", fraction = 0.8, rank = 0}'],
    ),
    "bias_oscillates": (
        1,
        [*DEEPSEEK, NO_LOSS, '--model.expert_bias={type = "sign", speed = 0.1}'],
    ),
    "aux_loss_dominates": (
        1,
        [
            *DEEPSEEK,
            "--metrics.router_gradients",
            '--model.aux_losses=[{type = "sequence_wise", weight = 10.0}]',
        ],
    ),
    "nothing_balances": (1, [*QWEN, NO_LOSS, "--model.expert_bias=none"]),
    "too_weak": (
        1,
        [
            *QWEN,
            f"{LEARNING_RATE}3e-3",
            '--model.aux_losses=[{type = "global_batch", weight = 1e-7}]',
        ],
    ),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_the_planted_fault_is_named(ranks, tmp_path, kind):
    num_ranks, arguments = PLANTED[kind]
    assert kind in diagnosed(ranks, tmp_path, arguments, num_ranks)


def test_gates_of_zeros_leave_experts_dead(ranks, tmp_path):
    """All scores are equal, and the same experts win every time."""
    arguments = [*QWEN, f"{LEARNING_RATE}0.0"]
    found = diagnosed(ranks, tmp_path, arguments, zero_gates=True)
    assert found[:2] == ["collapse", "dead_experts"]


HEALTHY = {
    "quantile": [*DEEPSEEK, NO_LOSS, '--model.expert_bias={type = "quantile"}'],
    "default": [*DEEPSEEK, "--metrics.router_gradients"],
    "quantile with softmax": [*QWEN, NO_LOSS, '--model.expert_bias={type = "quantile"}'],
}


@pytest.mark.parametrize("name", HEALTHY)
def test_nothing_is_wrong_with_a_healthy_run(ranks, tmp_path, name):
    assert diagnosed(ranks, tmp_path, HEALTHY[name]) == []
