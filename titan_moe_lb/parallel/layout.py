"""The parallel layout of a job, resolved to numbers before any process group exists."""

from __future__ import annotations

import os

import torch.distributed as dist
from torchtitan.config import ParallelismConfig
from torchtitan.distributed import ParallelDims

from titan_moe_lb.errors import JobError


def world_size() -> int:
    """Processes of this job: from the process group, else as the launcher announced."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def resolve(parallelism: ParallelismConfig, num_processes: int | None = None) -> ParallelDims:
    """The degrees of every mesh axis, with ``data_parallel_shard_degree = -1`` filled in.

    Args:
        parallelism: the job's ``[parallelism]``.
        num_processes: default: :func:`world_size`.

    Raises:
        JobError: the product of the degrees is not the number of processes.
    """
    processes = world_size() if num_processes is None else num_processes
    fixed = {
        "data_parallel_replicate_degree": parallelism.data_parallel_replicate_degree,
        "context_parallel_degree": parallelism.context_parallel_degree,
        "tensor_parallel_degree": parallelism.tensor_parallel_degree,
        "pipeline_parallel_degree": parallelism.pipeline_parallel_degree,
    }
    shard = parallelism.data_parallel_shard_degree
    if shard != -1:
        fixed["data_parallel_shard_degree"] = shard
    for name, degree in {
        **fixed,
        "expert_parallel_degree": parallelism.expert_parallel_degree,
    }.items():
        if degree < 1:
            raise JobError(f"parallelism.{name} is {degree}; it must be at least 1")
    product = 1
    for degree in fixed.values():
        product *= degree
    if processes % product or (shard != -1 and processes != product):
        asked = " x ".join(f"{name} {degree}" for name, degree in fixed.items() if degree > 1)
        multiple = "a multiple of " if shard == -1 else ""
        raise JobError(
            f"the job runs in {processes} process(es) but its parallelism ({asked or 'none'}) "
            f"needs {multiple}{product}: set NGPU={product} or change [parallelism]"
        )
    dims = ParallelDims.from_config(parallelism, processes)
    if (dims.dp_shard * dims.cp * dims.tp) % dims.ep:
        raise JobError(
            f"parallelism.expert_parallel_degree {dims.ep} must divide "
            f"data_parallel_shard x context_parallel x tensor_parallel = "
            f"{dims.dp_shard} x {dims.cp} x {dims.tp}"
        )
    return dims


def metrics_rank(dims: ParallelDims, schedule: str) -> int:
    """The global rank that sees the loss: the first of the last pipeline stage.

    A V-shaped schedule puts the last stage on the first pipeline rank.
    """
    if dims.pp == 1 or schedule in ("ZBVZeroBubble", "DualPipeV"):
        return 0
    return dims.world_size // dims.pp * (dims.pp - 1)
