"""The weights that a job begins with, read from a checkpoint of its first step at learning rate 0.

The reference is one process, which draws every weight once.
"""

from __future__ import annotations

import pytest
import torch

from tests.chaos.job import tensors
from tests.train_jobs import train_config
from titan_moe_lb.job import job_config

LAYOUTS = {
    "ep=2": (2, ["--parallelism.expert_parallel_degree=2"]),
    "fsdp=2": (2, ["--parallelism.data_parallel_shard_degree=2"]),
    "tp=2": (2, ["--parallelism.tensor_parallel_degree=2"]),
    "ddp=2": (2, ["--parallelism.data_parallel_replicate_degree=2"]),
    "fsdp=4,ep=2": (4, ["--parallelism.expert_parallel_degree=2"]),
    "tp=2,fsdp=2": (4, ["--parallelism.tensor_parallel_degree=2"]),
    "pp=2,fsdp=2": (4, ["--parallelism.pipeline_parallel_degree=2"]),
    "pp=2,interleaved": (
        2,
        [
            "--parallelism.pipeline_parallel_degree=2",
            "--parallelism.pipeline_parallel_schedule=Interleaved1F1B",
        ],
    ),
}
BACKENDS = {
    f"tp=2,{backend}": (2, [*LAYOUTS["tp=2"][1], f"--parallelism.spmd_backend={backend}"])
    for backend in ("partial_dtensor", "full_dtensor")
}


@pytest.fixture(scope="module")
def one_process(ranks, tmp_path_factory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("one")
    ranks.run(1, first_step, str(folder), [])
    return weights(folder)


@pytest.mark.parametrize("layout", [*LAYOUTS, *BACKENDS])
def test_every_layout_begins_with_the_weights_of_one_process(ranks, one_process, tmp_path, layout):
    num_ranks, flags = (LAYOUTS | BACKENDS)[layout]
    ranks.run(num_ranks, first_step, str(tmp_path), flags)
    found = weights(tmp_path)
    for name, weight in found.items():
        if ".inner_experts." in name or name.endswith("gate.weight"):
            rows = weight.flatten(0, -2)
            assert len(rows.unique(dim=0)) == len(rows), f"{name} has rows that are copies"
    assert found.keys() == one_process.keys()
    wrong = [name for name, weight in found.items() if not torch.equal(weight, one_process[name])]
    assert not wrong


def first_step(folder: str, flags: list[str]) -> None:
    """One step at learning rate 0, saved. Every rank."""
    job = job_config.load(
        [
            "--module=qwen3",
            "--config=qwen3_tiny",
            "--training.steps=1",
            "--training.global_batch_size=8",
            "--training.local_batch_size=2",
            "--checkpoint.enable",
            "--debug.seed=5",
            "--debug.no-enable-structured-logging",
            f"--dump_folder={folder}",
            *flags,
        ]
    )
    for group in job.config.optimizer.param_groups:
        group.optimizer_kwargs["lr"] = 0.0
    train_config(job.config)


def weights(folder) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for name, tensor in tensors(folder, step=1).items()
        if name.endswith((".weight", "_EFD", "_EDF"))
    }
