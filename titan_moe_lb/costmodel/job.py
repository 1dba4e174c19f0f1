"""What the model needs to know of a job, read from the job itself.

The job's config is built for its number of processes and one rank of each pipeline
position is built on the meta device inside a fake process group, by torchtitan's own
pipelining and parallelizing functions: nothing is typed again, nothing is allocated.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from titan_moe_lb.costmodel.layer import BF16_BYTES, MoELayer
from titan_moe_lb.errors import JobError
from titan_moe_lb.parallel.schedules import Schedule, actions_of, stages_of

if TYPE_CHECKING:
    from torch import nn
    from torchtitan.distributed import ParallelDims
    from torchtitan.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One pipeline stage. FLOPs and bytes are of one token, forward, before TP divides them."""

    moe_layers: tuple[int, ...]
    """Numbers of its MoE layers in the whole model."""
    num_layers: int
    dense_flops: float
    """Matrix products outside MoE layers, attention included."""
    dense_bytes: float
    """Kept for the backward outside MoE layers without checkpointing: an estimate, the
    inputs and results of the linear layers."""


@dataclass(frozen=True, kw_only=True)
class RankState:
    """What one rank holds whatever the routing does. Bytes are of its local shards."""

    rank: int
    num_parameters: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    unsharded_bytes: int
    """FSDP's gathered parameters and unreduced gradients at their most."""

    @property
    def total_bytes(self) -> int:
        return (
            self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes + self.unsharded_bytes
        )


@dataclass(frozen=True, kw_only=True)
class JobModel:
    """A job as the cost model sees it, at one expert-parallel degree."""

    model_name: str
    flavor: str
    num_ranks: int
    ep_degree: int
    tp_degree: int
    moe_layers: dict[int, MoELayer]
    """By layer number in the whole model."""
    dim: int
    stages: tuple[Stage, ...]
    schedule: Schedule
    """Actions of each pipeline rank for one optimizer step without accumulation."""
    accumulation_steps: int
    tokens_per_microbatch: int
    """Tokens of one micro-batch on one rank, before TP splits the sequence."""
    checkpointing: str
    """"none", "selective", "full"."""
    states: dict[int, RankState]
    """By pipeline rank, for those that were built."""

    @property
    def tokens_per_rank(self) -> int:
        """Tokens that one rank routes: with EP, the ranks of TP route other tokens."""
        return self.tokens_per_microbatch // (self.tp_degree if self.ep_degree > 1 else 1)


def read_job(
    config: Trainer.Config,
    *,
    pipeline_ranks: Iterable[int] | None = None,
    stages: tuple[Stage, ...] = (),
) -> JobModel:
    """Build ranks of the job on the meta device and read them. ``WORLD_SIZE`` is set.

    Args:
        config: resolved; it is consumed.
        pipeline_ranks: the pipeline ranks to build; all of them by default.
        stages: of the same job at another expert-parallel degree, which they do not
            depend on; needed where not all pipeline ranks are built.

    Raises:
        JobError: the model has no MoE layers, or its checkpointing cannot be planned.
    """
    import torch
    from torchtitan.config import TORCH_DTYPE_MAP
    from torchtitan.tools.utils import set_default_dtype

    from titan_moe_lb.parallel import layout
    from titan_moe_lb.upstream import cpu

    if cpu.needed():
        cpu.adapt(config)
    config.compile.enable = False
    dims = layout.resolve(config.parallelism)
    spec, training = config.model_spec, config.training
    assert spec is not None
    moe_layers = _moe_layers(config)
    if not moe_layers:
        raise JobError(f"{spec.name} {spec.flavor} has no MoE layers: there is nothing to plan")
    spec.model.update_from_config(config=config)
    with torch.device("meta"), set_default_dtype(TORCH_DTYPE_MAP[training.dtype]):
        model = spec.model.build()
    attention_flops = _attention_flops(config, model)
    found: dict[int, Stage] = {}
    states: dict[int, RankState] = {}
    schedule: Schedule = {}
    for position in range(dims.pp) if pipeline_ranks is None else pipeline_ranks:
        rank = position * (dims.world_size // dims.pp)
        with _fake_rank(rank, dims.world_size):
            schedule, parts = _build_parts(config, model, position)
            states[position] = _rank_state(rank, config, dims, [part for _index, part in parts])
            for index, part in parts:
                found[index] = _stage(part, len(spec.model.layers), moe_layers, attention_flops)
    passes = training.local_batch_size * dims.dp_replicate * dims.dp_shard
    return JobModel(
        model_name=spec.name,
        flavor=spec.flavor,
        num_ranks=dims.world_size,
        ep_degree=dims.ep,
        tp_degree=dims.tp,
        moe_layers=moe_layers,
        dim=next(iter(moe_layers.values())).dim,
        stages=stages or tuple(found[index] for index in sorted(found)),
        schedule=schedule,
        accumulation_steps=max(1, training.global_batch_size // passes),
        tokens_per_microbatch=_microbatch_size(config) * training.seq_len // dims.cp,
        checkpointing=_checkpointing(config),
        states=states,
    )


@contextmanager
def _fake_rank(rank: int, world_size: int) -> Iterator[None]:
    """This process as one rank of a process group without peers."""
    import spmd_types._mesh_axis
    import torch.distributed as dist
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache
    from torchtitan.config import CommConfig
    from torchtitan.distributed import utils

    before = {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "NGPU", "WORLD_SIZE")}
    os.environ.update(
        RANK=str(rank), LOCAL_RANK="0", NGPU=str(world_size), WORLD_SIZE=str(world_size)
    )
    utils.init_distributed(CommConfig(mode="fake_backend"))
    try:
        yield
    finally:
        dist.destroy_process_group()
        # Both keep what they knew of the process group that is gone.
        spmd_types._mesh_axis._reset()
        _clear_sharding_prop_cache()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _build_parts(
    config: Trainer.Config, model: nn.Module, position: int
) -> tuple[Schedule, list[tuple[int, nn.Module]]]:
    """The parts of the model on one pipeline rank, by stage, as the trainer makes them."""
    import torch
    from torchtitan.distributed import ParallelDims, utils

    spec = config.model_spec
    assert spec is not None
    dims = ParallelDims.from_config(config.parallelism, torch.distributed.get_world_size())
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
        return actions_of(None), [(0, spec.parallelize_fn(model, **parallel))]
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
    return schedule, list(zip(stages_of(schedule[position]), parts, strict=True))


def _microbatch_size(config: Trainer.Config) -> int:
    """Sequences of one forward of a stage."""
    if config.parallelism.pipeline_parallel_degree > 1:
        return config.parallelism.pipeline_parallel_microbatch_size
    return config.training.local_batch_size


def _moe_layers(config: Trainer.Config) -> dict[int, MoELayer]:
    from torchtitan.models.common.moe import MoE

    """By number in the whole model; layers of multi-token prediction come after the others."""
    assert config.model_spec is not None
    model = config.model_spec.model
    found = {}
    for number, block in enumerate([*model.layers, *getattr(model, "mtp_layers", [])]):
        moe = getattr(block, "moe", None)
        if not isinstance(moe, MoE.Config):
            continue
        experts = moe.routed_experts.inner_experts
        shared = moe.shared_experts
        found[number] = MoELayer(
            num_experts=moe.num_experts,
            top_k=moe.router.top_k,
            dim=experts.dim,
            hidden_dim=experts.hidden_dim,
            shared_hidden_dim=shared.w1.out_features if shared is not None else 0,
        )
    return found


def _attention_flops(config: Trainer.Config, model: nn.Module) -> float:
    """Forward FLOPs of the scores and values of one layer for one token.

    From the model's own count of FLOPs: the part that grows with the sequence.
    """
    assert config.model_spec is not None
    model_config = config.model_spec.model
    _parameters, flops = model_config.get_nparams_and_flops(model, config.training.seq_len)
    _parameters, without = model_config.get_nparams_and_flops(model, 0)
    # torchtitan counts the forward once and the backward twice.
    return (flops - without) / 3 / len(model_config.layers)


def _stage(
    part: nn.Module, num_layers: int, moe_layers: dict[int, MoELayer], attention_flops: float
) -> Stage:
    from torch.nn import Linear

    numbers = [int(name) for name, _block in part.get_submodule("layers").named_children()]
    numbers += [num_layers + index for index in range(len(getattr(part, "mtp_layers", None) or ()))]
    matrix_parameters = 0
    kept = 0.0
    for name, module in part.named_modules():
        if not isinstance(module, Linear) or ".moe." in f".{name}.":
            continue
        rows, columns = module.weight.shape
        matrix_parameters += rows * columns
        if "layers." in name:
            kept += BF16_BYTES * (rows + columns)
    return Stage(
        moe_layers=tuple(number for number in numbers if number in moe_layers),
        num_layers=len(numbers),
        dense_flops=2.0 * matrix_parameters + attention_flops * len(numbers),
        dense_bytes=kept,
    )


def _rank_state(
    rank: int, config: Trainer.Config, dims: ParallelDims, parts: list[nn.Module]
) -> RankState:
    from torchtitan.config import TORCH_DTYPE_MAP
    from torchtitan.distributed.fsdp import get_fsdp_reshard_after_forward_policy

    from titan_moe_lb.parallel.local_shard import local_shard

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
        config.parallelism.fsdp_reshard_after_forward, dims.pp > 1
    )
    # Between reshardings, the unit at work and the one that is fetched ahead are gathered.
    unsharded = working * (min(2 * largest, whole) if reshards else whole)
    # A pipeline reduces the gradients of all micro-batches together at the end.
    unsharded += reduced * (whole if dims.pp > 1 else largest)
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
    from torch.distributed.tensor import DTensor

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


def _checkpointing(config: Trainer.Config) -> str:
    from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC

    policy = config.activation_checkpoint
    if policy is None:
        return "none"
    if isinstance(policy, FullAC.Config):
        return "full"
    if isinstance(policy, SelectiveAC.Config):
        return "selective"
    raise JobError(
        f"activation checkpointing {type(policy).__qualname__.removesuffix('.Config')} is the "
        'compiler\'s decision, which cannot be planned: set [activation_checkpoint] type = "full", '
        '"selective" or "none"'
    )
