"""Construction of a parallelized and initialized torchtitan model for a user's training loop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torchtitan.config import (
    TORCH_DTYPE_MAP,
    CommConfig,
    CompileConfig,
    OverrideConfig,
    ParallelismConfig,
    TrainingConfig,
    apply_overrides,
)
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as dist_utils
from torchtitan.distributed.activation_checkpoint import ActivationCheckpointing
from torchtitan.protocols.model import BaseModel
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.tools import utils

from titan_moe_lb import rules
from titan_moe_lb.errors import JobError
from titan_moe_lb.parallel import single_process
from titan_moe_lb.parallel.layout import Layout
from titan_moe_lb.resolved_job import Job
from titan_moe_lb.upstream import cpu


class BuiltModel(NamedTuple):
    """Model of a rank, with its meshes and the context of its forwards."""

    model: BaseModel
    """Model in training mode, on this rank's device."""

    parallel_dims: ParallelDims
    """Meshes over which the model is split."""

    train_context: Callable[[], AbstractContextManager[None]]
    """Factory of the context around each forward and its backward."""


def build_model(
    spec: ModelSpec,
    *,
    training: TrainingConfig,
    parallelism: ParallelismConfig | None = None,
    parallel_dims: ParallelDims | None = None,
    compile: CompileConfig | None = None,
    activation_checkpoint: ActivationCheckpointing.Config | None = None,
    override_imports: Sequence[str] = (),
    seed: int | None = None,
) -> BuiltModel:
    """Build a model as torchtitan's trainer does, without a trainer.

    ``torch.distributed`` is initialized if it is not yet, also for a single process.

    Args:
        spec: spec of torchtitan or of :func:`titan_moe_lb.balanced`; it is not changed.
        training: ``seq_len``, the longest row, and the dtypes.
        parallelism: degrees. Pipeline parallelism needs torchtitan's trainer.
        parallel_dims: dimensions of a model that this process has built before, such as the policy
            of a reference model: the two share their meshes.
        compile: torchtitan's compile settings; None: no compilation.
        activation_checkpoint: torchtitan's checkpointing settings; None: no checkpointing.
        override_imports: torchtitan's config overrides, as in ``[override] imports``.
        seed: seed of the weights; None: other weights in every run.

    Raises:
        JobError: the degrees do not fit the processes, or a rule of a job's model does not hold.
    """
    parallelism = parallelism or ParallelismConfig()
    if parallelism.pipeline_parallel_degree > 1:
        raise JobError(
            "build_model makes no pipeline: leave pipeline_parallel_degree at 1, or train with "
            "torchtitan's Trainer"
        )
    compile = compile or CompileConfig()
    layout = (
        Layout.of_dims(parallel_dims)
        if parallel_dims is not None
        else Layout.of(parallelism, single_process.world_size())
    )
    asked = SimpleNamespace(
        parallelism=parallelism,
        compile=compile,
        activation_checkpoint=activation_checkpoint,
        traverse=spec.model.traverse,
    )
    for rule in rules.OF_A_MODEL:
        rule(Job(asked, layout, None))
    cpu.prepare()
    dims = parallel_dims or ParallelDims.from_config(parallelism, layout.world_size)
    dist_utils.set_spmd_backend(parallelism.spmd_backend)
    with nullcontext() if single_process.is_launched() else single_process.announced():
        if not torch.distributed.is_initialized():
            dist_utils.init_distributed(CommConfig())
        device = utils.get_local_device()
    if seed is not None:
        torch.manual_seed(seed)
    utils.device_module.set_device(device)
    spec = copy.deepcopy(spec)
    config = spec.model
    config.update_from_config(config=SimpleNamespace(parallelism=parallelism))
    for layer in config.layers:  # type: ignore[attr-defined]
        rope = getattr(layer.attention, "rope", None)
        if rope is not None:
            rope.max_seq_len = training.seq_len
    overrides = list(override_imports)
    if cpu.needed():
        overrides.append(cpu.DENSE_ATTENTION)
        cpu.adapt_spec(spec)
    apply_overrides(OverrideConfig(imports=overrides), config)
    with torch.device("meta"), utils.set_default_dtype(TORCH_DTYPE_MAP[training.dtype]):
        model = config.build()
    model = spec.parallelize_fn(
        model,
        parallel_dims=dims,
        training=training,
        parallelism=parallelism,
        compile_config=compile,
        ac_config=activation_checkpoint,
        dump_folder="",
    )
    model.to_empty(device=device)
    with torch.no_grad(), _one_generator(seed, dims):
        model.init_weights(buffer_device=None)
    model.train()
    return BuiltModel(model, dims, dist_utils.get_spmd_context(parallel_dims=dims))


def _one_generator(seed: int | None, dims: ParallelDims) -> AbstractContextManager[None]:
    """Return a context in which ranks draw equal numbers although no seed is set.

    DTensor on an accelerator needs no such context.
    """
    if seed is not None or dims.world_size == 1 or not cpu.needed():
        return nullcontext()
    from titan_moe_lb.upstream.cpu.random_numbers import generator_of_rank_0

    return generator_of_rank_0()
