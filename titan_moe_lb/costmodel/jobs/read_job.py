"""Sizes of a job, read from torchtitan's own model and pipeline.

torchtitan's pipelining and parallelizing functions build one rank of each kind of pipeline
position, on the meta device inside a fake process group. No size is written twice, and no memory
is allocated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torchtitan.components.loss import ChunkedLossWrapper
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
from torchtitan.models.common.moe import MoE
from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts
from torchtitan.protocols.module import Module
from torchtitan.tools.utils import set_default_dtype

from titan_moe_lb.costmodel.jobs.pipeline_positions import positions_of
from titan_moe_lb.costmodel.jobs.rank_memory import build_parts, fake_rank, rank_state
from titan_moe_lb.costmodel.jobs.read_block import BlockReader
from titan_moe_lb.costmodel.times.gemm import BF16_BYTES
from titan_moe_lb.costmodel.times.job import Head, JobModel, RankState, Stage
from titan_moe_lb.costmodel.times.moe_layer import MoELayer
from titan_moe_lb.errors import JobError
from titan_moe_lb.parallel.layer_numbers import layer_numbers
from titan_moe_lb.parallel.schedules import Schedule
from titan_moe_lb.resolved_job import Job
from titan_moe_lb.upstream import cpu


def read_job(
    job: Job,
    *,
    pipeline_ranks: Iterable[int] | None = None,
    stages: tuple[Stage, ...] = (),
    on_host: bool = False,
) -> JobModel:
    """Build ranks of the job on the meta device and read their sizes.

    Args:
        job: the resolved job. Its config is modified, so it cannot be used again.
        pipeline_ranks: pipeline ranks to read; default: all of them.
        stages: stages of the same job at another expert-parallel degree, which does not change
            them. Required if ``pipeline_ranks`` leaves some out.
        on_host: plan for a host as the device.

    Raises:
        JobError: the model has no MoE layers, a block is of an unknown kind, or the
            checkpointing cannot be planned.
    """
    config, layout, cut = job.config, job.layout, job.cut
    if cpu.needed():
        cpu.adapt(config)
    config.compile.enable = False
    spec, dtype = config.model_spec, TORCH_DTYPE_MAP[config.training.dtype]
    moe_layers = bind(job)
    numbers, loss_bytes = layer_numbers(spec.model), _loss_bytes(config, layout.tp)
    reader = BlockReader(tp_degree=layout.tp, seq_len=cut.seq_len, on_host=on_host)
    positions = positions_of(job)
    found: dict[int, Stage] = {}
    states: dict[int, RankState] = {}
    schedule: Schedule = {}
    for number in range(layout.pp) if pipeline_ranks is None else pipeline_ranks:
        rank, position = number * (layout.world_size // layout.pp), positions[number]
        twin = next((other for other in states if positions[other].kind == position.kind), None)
        if twin is not None:
            states[number] = dataclasses.replace(states[twin], rank=rank)
            if not stages:
                found |= position.stages_like(positions[twin], found)
            continue
        model = meta_model(spec.model, dtype, position.layers)
        attention_flops = _attention_flops(config, model)
        with fake_rank(rank, layout.world_size):
            schedule, parts = build_parts(config, model, number)
            states[number] = rank_state(rank, job, list(parts.values()))
            if not stages:
                for index, part in parts.items():
                    found[index] = _stage(part, numbers, attention_flops, reader, loss_bytes)
    return JobModel(
        model_name=spec.name,
        flavor=spec.flavor,
        num_ranks=layout.world_size,
        ep_degree=layout.ep,
        tp_degree=layout.tp,
        moe_layers=moe_layers,
        dim=next(iter(moe_layers.values())).dim,
        stages=stages or tuple(found[index] for index in sorted(found)),
        schedule=schedule,
        accumulation_steps=cut.accumulation_steps,
        tokens_per_microbatch=cut.micro_batch_size * cut.seq_len // layout.cp,
        checkpointing=_checkpointing(config),
        seq_len=cut.seq_len,
        on_host=on_host,
        # Upstream fact: torch before 2.15 keeps the buffers of every micro-batch of a pass.
        releases_buffers=hasattr(PipelineStage, "release_fwd_send_outputs"),
        steps=config.training.steps,
        tokens_per_step=cut.global_batch_size * cut.seq_len,
        states=states,
    )


def bind(job: Job) -> dict[int, MoELayer]:
    """Fill in the job's model, as torchtitan does before it builds it, and read its MoE layers.

    The config is modified.

    Raises:
        JobError: the model has no MoE layers.
    """
    spec = job.config.model_spec
    job.bind()
    spec.model.update_from_config(config=job.config)
    return moe_layers_of(spec)


def meta_model(model: Any, dtype: torch.dtype, layers: set[int] | None = None) -> Any:
    """Build a model on the meta device.

    Decoder layers that are not among ``layers`` are empty modules; None: all are built.
    """
    whole = model.layers
    # The built model refers to this list: pipelining copies it with every stage.
    model.layers = [
        layer if layers is None or number in layers else _Empty.Config()
        for number, layer in enumerate(whole)
    ]
    try:
        with torch.device("meta"), set_default_dtype(dtype):
            return model.build()
    finally:
        model.layers = whole


class _Empty(Module):
    """Decoder layer of another pipeline rank."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        """No settings."""

    def __init__(self, config: Config) -> None:
        super().__init__()


def moe_layers_of(spec: Any) -> dict[int, MoELayer]:
    """Read the MoE layers of a model spec, by number in the whole model.

    Raises:
        JobError: the model has no MoE layers.
    """
    numbers = layer_numbers(spec.model)
    if not numbers:
        raise JobError(f"{spec.name} {spec.flavor} has no MoE layers: there is nothing to plan")
    return {numbers[name]: _moe_layer(moe) for name, moe, *_ in spec.model.traverse(MoE.Config)}


def _moe_layer(moe: MoE.Config) -> MoELayer:
    experts, shared = moe.routed_experts.inner_experts, moe.shared_experts
    return MoELayer(
        num_experts=moe.num_experts,
        top_k=moe.router.top_k,
        dim=experts.dim,
        hidden_dim=experts.hidden_dim,
        shared_hidden_dim=shared.w1.out_features if shared is not None else 0,
        num_groups=moe.router.num_expert_groups or 1,
        num_limited_groups=moe.router.num_limited_groups or 1,
        expert_biases=isinstance(experts, GptOssGroupedExperts.Config),
        neighbouring_choices=moe.router._debug_force_load_balance,
    )


def _attention_flops(config: Any, model: nn.Module) -> float:
    """Forward FLOPs of the scores and values of one layer for one token.

    They are the part of the model's own FLOP count that grows with the sequence.
    """
    model_config = config.model_spec.model
    _parameters, flops = model_config.get_nparams_and_flops(model, config.training.seq_len)
    _parameters, without = model_config.get_nparams_and_flops(model, 0)
    # torchtitan counts forward and backward as three forwards. It counts all scores, of which
    # a causal mask leaves half.
    return (flops - without) / 3 / 2 / len(model_config.layers)


def _loss_bytes(config: Any, tp_degree: int) -> tuple[float, float]:
    """Bytes of the loss of one token, for each of D hidden values and for each of V logits.

    A chunked loss holds the chunks of the hidden state in BF16 and the sum of their gradients
    in float32. With TP it first gathers the tokens of all TP ranks.

    The logits of one chunk are in BF16. Their log-probabilities, the gradient of these, and the
    gradient of the logits are in float32. With TP, which splits the vocabulary, the softmax is
    stored in float32 as well.
    """
    chunks, of_hidden = 1, 0
    if isinstance(config.loss, ChunkedLossWrapper.Config):
        chunks = config.loss.num_chunks
        of_hidden = tp_degree * (2 + 4) + (2 * tp_degree if tp_degree > 1 else 0)
    return of_hidden, (2 + 4 * (4 if tp_degree > 1 else 3)) / chunks


def _stage(
    part: Any,
    numbers: dict[str, int],
    attention_flops: float,
    reader: BlockReader,
    loss_bytes: tuple[float, float],
) -> Stage:
    blocks = _blocks(part)
    matrix_parameters = 0
    kept = 0.0
    vocabulary = 0
    for name, module in part.named_modules():
        if not isinstance(module, nn.Linear) or ".moe." in f".{name}.":
            continue
        rows, columns = module.weight.shape
        matrix_parameters += rows * columns
        if "layers." in name:
            kept += BF16_BYTES * (rows + columns)
        else:
            vocabulary += rows
    head = None
    if vocabulary:
        dim = part.norm.weight.shape[0]
        head = Head(
            norm=reader.norm(dim) + BF16_BYTES * dim,
            loss=loss_bytes[0] * dim + loss_bytes[1] * vocabulary,
        )
    return Stage(
        moe_layers=tuple(numbers[name] for name, _ in part.named_modules() if name in numbers),
        dense_flops=2.0 * matrix_parameters + attention_flops * len(blocks),
        dense_bytes=kept,
        vocabulary=vocabulary,
        blocks=tuple(
            reader.read(block, numbers.get(f"{name}.moe")) for name, block in blocks.items()
        ),
        head=head,
    )


def _blocks(part: nn.Module) -> dict[str, nn.Module]:
    """Collect the transformer blocks of a part by name, multi-token prediction included."""
    blocks = {
        f"{group}.{name}": block
        for group in ("layers", "mtp_layers")
        for name, block in (getattr(part, group, None) or nn.ModuleList()).named_children()
    }
    for name, block in blocks.items():
        if not hasattr(block, "attention_norm"):
            raise JobError(
                f"{name} is a {type(block).__name__} without an attention_norm: the memory of "
                "such a block is unknown, so the job cannot be planned"
            )
    return blocks


def _checkpointing(config: Any) -> str:
    policy = config.activation_checkpoint
    if policy is None:
        return "none"
    if isinstance(policy, FullAC.Config):
        return "full"
    if isinstance(policy, SelectiveAC.Config):
        return "selective"
    raise JobError(
        f"activation checkpointing {type(policy).__qualname__.removesuffix('.Config')} leaves "
        'its choice to the compiler and cannot be planned: set [activation_checkpoint] type = "full", '
        '"selective" or "none"'
    )
