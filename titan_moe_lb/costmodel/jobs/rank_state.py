"""The bytes that a rank of a job holds whatever the routing does."""

from __future__ import annotations

from torch import nn
from torch.distributed.tensor import DTensor
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed.fsdp import get_fsdp_reshard_after_forward_policy
from torchtitan.trainer import Trainer

from titan_moe_lb.costmodel.times.job import RankState
from titan_moe_lb.parallel.local_shard import local_shard
from titan_moe_lb.resolved_job import Job


def rank_state(rank: int, job: Job, parts: list[nn.Module]) -> RankState:
    """Count the bytes of one rank.

    Args:
        parts: of the model, built on the meta device for this rank.
    """
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
    # Between reshardings, the unit at work and the one that is fetched ahead are gathered.
    unsharded = working * (min(2 * largest, whole) if reshards else whole)
    # A unit's gradients are copied together to be reduced. A pipeline reduces those of all
    # micro-batches in the last one's backward; until then it has them whole.
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
    """Elements of a parameter after FSDP's all-gather: split by TP and EP alone."""
    size = parameter.numel()
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        assert mesh.mesh_dim_names is not None
        for axis, placement in zip(mesh.mesh_dim_names, parameter.placements, strict=True):
            if axis in ("tp", "ep") and not placement.is_replicate():
                size //= mesh.size(mesh.mesh_dim_names.index(axis))
    return size


def _optimizer_states(config: Trainer.Config) -> int:
    """Values that the optimizer keeps for each parameter, of the parameter's type."""
    names = {group.optimizer_name for group in config.optimizer.param_groups}
    known = {"Adam": 2, "AdamW": 2, "SGD": 1, "Muon": 1}
    # An optimizer that is not known here is counted as Adam.
    return max((known.get(name, 2) for name in names), default=2)
