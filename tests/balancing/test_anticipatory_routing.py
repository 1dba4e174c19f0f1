"""Tests of anticipatory routing against a loop that keeps old parameters by copying them."""

from __future__ import annotations

import pytest
import torch

from tests.support.anticipated_jobs import SPEED, reference, trained

STEPS = 5
JOB = [
    "--module=deepseek_v3",
    "--config=deepseek_v3_tiny",
    f"--training.steps={STEPS}",
    "--metrics.log_freq=1",
    "--debug.seed=3",
    "--training.global_batch_size=8",
    "--model.aux_losses=[]",
    "--optimizer.param_groups.0.optimizer_kwargs.lr=0.02",
    "--lr_scheduler.warmup_steps=0",
]
SIGN = f'--model.expert_bias={{type = "sign", speed = {SPEED}}}'
FROZEN = [SIGN, '--model.freeze={bias = "all"}']


def anticipatory(delay: int) -> str:
    return f'--model.routing={{type = "anticipatory", delay = {delay}}}'


def dp(degree: int, local: int, *others: str) -> list[str]:
    return [
        f"--parallelism.data_parallel_shard_degree={degree}",
        f"--training.local_batch_size={local}",
        *others,
    ]


LAYOUTS = {
    "one": (1, dp(1, 8)),
    "accumulation": (1, dp(1, 2)),
    "full_ac": (1, dp(1, 4, "activation-checkpoint:full")),
    "selective_ac": (2, dp(2, 4, "activation-checkpoint:selective")),
    "fsdp": (2, dp(2, 4)),
    "hsdp": (4, dp(2, 2, "--parallelism.data_parallel_replicate_degree=2")),
    "ep": (2, dp(2, 2, "--parallelism.expert_parallel_degree=2")),
    "tp": (2, dp(1, 8, "--parallelism.tensor_parallel_degree=2")),
    "tp_ep": (
        4,
        dp(
            2,
            4,
            "--parallelism.tensor_parallel_degree=2",
            "--parallelism.expert_parallel_degree=4",
        ),
    ),
    "cp": (
        2,
        dp(1, 8, "--parallelism.context_parallel_degree=2", "--training.seq_len=256"),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_copied_parameters(ranks, layout):
    """Experts and biases are bitwise those of old parameters, losses to 1e-6; 0 changes nothing."""
    num_ranks, flags = LAYOUTS[layout]
    plain = ranks.run(num_ranks, trained, [*JOB, SIGN, *flags])
    for delay in (0, 1, 3):
        ours = ranks.run(num_ranks, trained, [*JOB, SIGN, anticipatory(delay), *flags])
        theirs = plain
        if delay:
            theirs = ranks.run(num_ranks, reference, [*JOB, *FROZEN, *flags], delay)
        for mine, expected in zip(ours, theirs, strict=True):
            assert len(mine[0]) == STEPS
            assert mine[0] == pytest.approx(expected[0], rel=1e-6 if delay else 0, abs=0)
            for tensors, expected_tensors in zip(mine[1:], expected[1:], strict=True):
                assert len(tensors) == len(expected_tensors) > 0
                assert all(map(torch.equal, tensors, expected_tensors))
        # A delay acts: plain training sends tokens elsewhere.
        assert all(map(torch.equal, ours[0][1], plain[0][1])) == (delay == 0)
