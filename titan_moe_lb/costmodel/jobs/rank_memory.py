"""One rank of a job on the meta device, without its peers: model parts and bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torchtitan.config import TORCH_DTYPE_MAP, CommConfig
from torchtitan.distributed import ParallelDims, utils
from torchtitan.distributed.fsdp import get_fsdp_reshard_after_forward_policy

from titan_moe_lb.costmodel.times.job import RankState
from titan_moe_lb.parallel import single_process
from titan_moe_lb.parallel.local_shard import local_shard
from titan_moe_lb.parallel.schedules import Schedule, actions_of, stages_of
from titan_moe_lb.resolved_job import Job
from titan_moe_lb.upstream.mesh_caches import forget_meshes


@contextmanager
def fake_rank(rank: int, world_size: int) -> Iterator[None]:
    """Make this process one rank of a process group without peers."""
    with single_process.announced(rank=rank, world_size=world_size):
        utils.init_distributed(CommConfig(mode="fake_backend"))
        try:
            yield
        finally:
            dist.destroy_process_group()
            forget_meshes()


def build_parts(
    config: Any, model: nn.Module, position: int
) -> tuple[Schedule, dict[int, nn.Module]]:
    """Build the schedule and this rank's model parts by stage, as torchtitan's trainer does."""
    spec = config.model_spec
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
    # The call copies this rank's stages out of the model.
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


def rank_state(rank: int, job: Job, parts: list[nn.Module]) -> RankState:
    """Count the bytes of a rank, built on the meta device, that do not depend on the routing."""
    config, pipelined = job.config, job.layout.pp > 1
    parameters = {
        f"{index}.{name}": parameter
        for index, part in enumerate(parts)
        for name, parameter in part.named_parameters()
    }
    local = [local_shard(parameter) for parameter in parameters.values()]
    parameter_bytes = sum(shard.numel() * shard.element_size() for shard in local)
    gathered: dict[str, int] = {}
    for name, parameter in parameters.items():
        unit = ".".join(name.split(".")[:3]) if ".layers." in name else name.split(".")[0]
        gathered[unit] = gathered.get(unit, 0) + _gathered_size(parameter)
    working = TORCH_DTYPE_MAP[config.training.mixed_precision_param].itemsize
    reduced = TORCH_DTYPE_MAP[config.training.mixed_precision_reduce].itemsize
    whole, largest = sum(gathered.values()), max(gathered.values(), default=0)
    reshards = get_fsdp_reshard_after_forward_policy(
        config.parallelism.fsdp_reshard_after_forward, pipelined
    )
    # With resharding, only the running unit and the prefetched one are gathered.
    unsharded = working * (min(2 * largest, whole) if reshards else whole)
    # FSDP copies a unit's gradients into one buffer to reduce them. A pipeline reduces in the
    # backward of the last micro-batch and keeps all gradients unsharded until then.
    unsharded += reduced * (whole + largest if pipelined else largest)
    return RankState(
        rank=rank,
        num_parameters=sum(shard.numel() for shard in local),
        parameter_bytes=parameter_bytes,
        gradient_bytes=parameter_bytes,
        optimizer_bytes=_optimizer_states(config) * parameter_bytes,
        unsharded_bytes=unsharded,
    )


def _gathered_size(parameter: nn.Parameter) -> int:
    """Elements of a parameter after FSDP's all-gather: only TP and EP still split it."""
    size = parameter.numel()
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        assert mesh.mesh_dim_names is not None
        for axis, placement in zip(mesh.mesh_dim_names, parameter.placements, strict=True):
            if axis in ("tp", "ep") and not placement.is_replicate():
                size //= mesh.size(mesh.mesh_dim_names.index(axis))
    return size


def _optimizer_states(config: Any) -> int:
    """Values that the optimizer keeps for each parameter, in the parameter's dtype."""
    names = {group.optimizer_name for group in config.optimizer.param_groups}
    known = {"Adam": 2, "AdamW": 2, "SGD": 1, "Muon": 1}
    # An unknown optimizer counts as Adam.
    return max((known.get(name, 2) for name in names), default=2)
