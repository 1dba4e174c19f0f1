"""Tests of ``titan-moe-lb check`` on jobs."""

from __future__ import annotations

import pytest

from titan_moe_lb.commands.check.command import self_test
from titan_moe_lb.errors import JobError

LOSS = '{type = "sequence_wise", weight = 1e-12}'
LEARNING_RATE = "--optimizer.param_groups.0.optimizer_kwargs.lr=0.0"


def kinds_of(arguments: list[str], folder: str) -> list[tuple[str, str]]:
    return [(one.kind, one.part) for one in self_test(arguments, folder).faults]


JOBS = {
    "deepseek_v3's default": (["--config=deepseek_v3_tiny"], None),
    "llama4's default": (["--module=llama4", "--config=llama4_tiny"], None),
    "gpt_oss's default": (["--module=gpt_oss", "--config=gpt_oss_tiny"], None),
    "qwen3 over a pipeline and experts": (
        ["--module=qwen3", "--job-config=qwen3/fsdp2_pp2_interleaved", "--config=qwen3_tiny"],
        None,
    ),
    "a weight of 1e-12": (
        ["--config=deepseek_v3_tiny", f"--model.aux_losses=[{LOSS}]"],
        ("loss_too_weak", "sequence_wise"),
    ),
    "a learning rate of 0": (
        ["--config=deepseek_v3_tiny", LEARNING_RATE],
        ("gate_without_learning_rate", "gate"),
    ),
    "a benchmark's routing": (
        ["--config=deepseek_v3_tiny", '--model.forced_routing={type = "round_robin"}'],
        ("bias_not_read", "bias"),
    ),
    "a speed of 1e-9": (
        ["--config=deepseek_v3_tiny", '--model.expert_bias={type = "sign", speed = 1e-9}'],
        ("bias_cannot_reach", "bias"),
    ),
}


@pytest.mark.parametrize("name", JOBS)
def test_a_job(ranks, tmp_path, name):
    arguments, expected = JOBS[name]
    (found,) = ranks.run(1, kinds_of, arguments, str(tmp_path))
    assert found[:1] == ([expected] if expected else []), found


def test_a_job_without_loss_and_bias_is_refused(tmp_path):
    flags = ["--config=deepseek_v3_tiny", "--model.aux_losses=[]", "--model.expert_bias=none"]
    with pytest.raises(JobError, match="aux_losses"):
        self_test(flags, str(tmp_path))


def test_a_model_that_does_not_fit_is_refused_at_once(tmp_path):
    with pytest.raises(JobError, match="--config"):
        self_test(["--job-config=deepseek_v3/671b"], str(tmp_path))
