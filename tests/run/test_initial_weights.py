"""Tests of initial weights, read from a checkpoint of the first step at learning rate 0.

The reference is one process, which draws every weight once.
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from torchtitan.config import ParallelismConfig, TrainingConfig

from model_registry.qwen3 import model_registry
from tests.parity.gradients import whole
from tests.support.saved_tensors import tensors
from tests.support.train_jobs import train_config
from titan_moe_lb.job import job_config
from titan_moe_lb.own_loop.build import build_model

LAYOUTS = {
    "ep=2": (2, ["--parallelism.expert_parallel_degree=2"]),
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
    assert_same(found, one_process)


@pytest.mark.parametrize(
    "degrees", [{"expert_parallel_degree": 2}, {"tensor_parallel_degree": 2}], ids=["ep=2", "tp=2"]
)
def test_built_model_begins_with_the_weights_of_one_process(ranks, degrees):
    ((expected,),) = ranks.run(1, built, [5], {})
    for (found,) in ranks.run(2, built, [5], degrees):
        assert_same(found, expected)


def test_ranks_of_a_model_built_without_a_seed_agree(ranks):
    """Each rank begins with its own generator, and continues with it."""
    (one, other), *others = ranks.run(2, built, [None, None], {"tensor_parallel_degree": 2})
    for found in others:
        assert_same(found[0], one)
        assert_same(found[1], other)
    weight = "layers.0.moe.router.gate.weight"
    assert not torch.equal(one[weight], other[weight]), "two models in one process"


def built(seeds: list[int | None], degrees: dict[str, int]) -> list[dict[str, torch.Tensor]]:
    """Build models one after another; return their weights. Every rank."""
    torch.manual_seed(100 + int(os.environ["RANK"]))
    models = []
    dims = None
    for seed in seeds:
        model, dims, _context = build_model(
            model_registry("tiny"),
            training=TrainingConfig(seq_len=64),
            parallelism=ParallelismConfig(**degrees),
            parallel_dims=dims,
            seed=seed,
        )
        models.append({name: whole(p) for name, p in model.named_parameters()})
    drawn = torch.rand(1)
    if None in seeds:
        every = [torch.empty(1) for _ in range(dist.get_world_size())]
        dist.all_gather(every, drawn)
        assert len({float(one) for one in every}) == len(every)
    return models


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]


def first_step(folder: str, flags: list[str]) -> None:
    """Train one step at learning rate 0, and save it. Every rank."""
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
