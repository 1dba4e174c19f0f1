"""One rank of a job without the others, built on the meta device by torchtitan's own functions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchtitan.config import CommConfig
from torchtitan.distributed import ParallelDims, utils
from torchtitan.trainer import Trainer

from titan_moe_lb.parallel import single_process
from titan_moe_lb.parallel.schedules import Schedule, actions_of, stages_of
from titan_moe_lb.upstream.torch_internals import forget_meshes


@contextmanager
def fake_rank(rank: int, world_size: int) -> Iterator[None]:
    """This process as one rank of a process group without peers."""
    with single_process.announced(rank=rank, world_size=world_size):
        utils.init_distributed(CommConfig(mode="fake_backend"))
        try:
            yield
        finally:
            dist.destroy_process_group()
            forget_meshes()


def build_parts(
    config: Trainer.Config, model: nn.Module, position: int
) -> tuple[Schedule, dict[int, nn.Module]]:
    """The schedule, and this rank's parts of the model by stage, as the trainer makes them."""
    spec = config.model_spec
    assert spec is not None
    dims = ParallelDims.from_config(config.parallelism, dist.get_world_size())
    dims.build_mesh()
    utils.set_spmd_backend(config.parallelism.spmd_backend)
    parallel: dict[str, Any] = {
        "parallel_dims": dims,
        "training": config.training,
        "parallelism": config.parallelism,
        "compile_config": config.compile,
        # Wrapping blocks for recomputation changes no parameter.
        "ac_config": None,
        "dump_folder": config.dump_folder,
    }
    if dims.pp == 1:
        return actions_of(None), {0: spec.parallelize_fn(model, **parallel)}
    assert spec.pipelining_fn is not None
    # Copies the stages of this rank out of the model.
    pipeline, parts, _first, _last = spec.pipelining_fn(
        model,
        **parallel,
        device=torch.device("meta"),
        model_config=spec.model,
        parallelize_fn=spec.parallelize_fn,
        loss_fn=lambda *arguments: None,
    )
    schedule = actions_of(pipeline)
    return schedule, dict(zip(stages_of(schedule[position]), parts, strict=True))
