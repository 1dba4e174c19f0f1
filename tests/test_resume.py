"""A run with the global-batch loss, stopped and resumed, is the uninterrupted run."""

from __future__ import annotations

import pytest
import torch

from tests.train_jobs import train
from titan_moe_lb.errors import JobError
from titan_moe_lb.job import job_config
from titan_moe_lb.rules.files import checkpoint_has_loss_state

JOB = [
    "--config",
    "deepseek_v3_tiny",
    "--model.aux_losses",
    '[{type="global_batch", weight=0.1}]',
    "--training.steps=4",
    "--checkpoint.enable",
    "--checkpoint.interval=2",
    "--checkpoint.no-last-save-model-only",
    "--debug.seed=1",
    "--debug.deterministic",
    "--parallelism.data_parallel_shard_degree=2",
]


def test_resumed_run_continues_bitwise(ranks, tmp_path):
    whole = ranks.run(2, train, [*JOB, f"--dump_folder={tmp_path}/whole"])
    folder = f"--dump_folder={tmp_path}/stopped"
    # The learning-rate schedule is that of four steps in both halves.
    first = ranks.run(
        2, train, [*JOB, folder, "--training.steps=2", "--lr_scheduler.total_steps=4"]
    )
    second = ranks.run(2, train, [*JOB, folder], first_step=3)

    def numbers(logged):
        return [
            (
                step["loss_metrics/global_avg_loss"],
                step["grad_norm"],
                step["moe/global_load_balancing_loss"],
            )
            for step in logged
        ]

    assert numbers(whole[0]) == numbers(first[0]) + numbers(second[0])
    assert numbers(whole[0])[2][2] != numbers(whole[0])[3][2]
    torch.testing.assert_close(
        *(_last_counts(f"{tmp_path}/{name}") for name in ("whole", "stopped")), rtol=0, atol=0
    )


def test_checkpoint_without_the_loss_is_refused_in_one_line(ranks, tmp_path, monkeypatch):
    """torchtitan's loader would end in a traceback about a missing key."""
    save = [*JOB[:2], "--training.steps=1", *JOB[5:8], "--checkpoint.interval=1"]
    for name, losses in (("without", "[]"), ("with", JOB[3])):
        model = ["--model.aux_losses", losses]
        ranks.run(1, train, [*save, *model, f"--dump_folder={tmp_path}/{name}"])
    monkeypatch.setenv("WORLD_SIZE", "1")
    resume = [*JOB[:4], "--checkpoint.enable"]
    for flag in ("--dump_folder={}", "--checkpoint.initial_load_path={}/checkpoint/step-1"):
        config = job_config.load([*resume, flag.format(tmp_path / "without")]).config
        with pytest.raises(JobError, match="saved without the global-batch loss"):
            checkpoint_has_loss_state(config)
        checkpoint_has_loss_state(job_config.load([*resume, flag.format(tmp_path / "with")]).config)


def _last_counts(folder: str) -> torch.Tensor:
    """The counts of the last step, as the checkpoint holds them."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.format_utils import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state: dict = {}
    _load_state_dict(
        state,
        storage_reader=FileSystemReader(f"{folder}/checkpoint/step-4"),
        planner=_EmptyStateDictLoadPlanner(),
        no_dist=True,
    )
    counts = [value for name, value in sorted(_flat(state).items()) if name.endswith("counts_E")]
    assert len(counts) == 3 and all(count.sum() > 0 for count in counts)
    return torch.stack(counts)


def _flat(tree: dict, prefix: str = "") -> dict[str, torch.Tensor]:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, torch.Tensor):
            flat[f"{prefix}{key}"] = value
    return flat
