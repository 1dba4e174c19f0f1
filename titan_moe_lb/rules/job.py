"""Rules of sizes, layout, optimizer, compiler and checkpoint of a job."""

from __future__ import annotations

import inspect
import math
import re

import torch
from torchtitan.components.checkpointer.base import (
    DATALOADER,
    LR_SCHEDULER,
    OPTIMIZER,
    TRAIN_STATE,
)
from torchtitan.models.common.attention import FlexAttention

from titan_moe_lb.errors import JobError, nearest
from titan_moe_lb.resolved_job import Job
from titan_moe_lb.upstream.torch_internals import FLEX_BLOCK_SIZE, compiler_backends

_AT_LEAST_ZERO = (
    "lr_scheduler.warmup_steps",
    "dataloader.num_workers",
    "profiler.profiler_warmup",
)
_AT_LEAST_ONE = (
    "training.local_batch_size",
    "training.seq_len",
    "training.steps",
    "training.gc_freq",
    "metrics.log_freq",
    "comm.init_timeout_seconds",
    "comm.train_timeout_seconds",
    "validator.freq",
    "profiler.profile_freq",
    "profiler.profiler_active",
    "lr_scheduler.total_steps",
)


def sizes_are_positive(job: Job) -> None:
    """Check the lower bounds of sizes, step counts and time limits."""
    for least, paths in enumerate((_AT_LEAST_ZERO, _AT_LEAST_ONE)):
        for path in paths:
            section, name = path.split(".")
            value = getattr(getattr(job.config, section), name, least)
            if value is not None and value < least:
                raise JobError(f"{path} is {value}; it must be at least {least}")
    total = job.config.training.global_batch_size
    if total != -1 and total < 1:
        raise JobError(
            f"training.global_batch_size is {total}; it must be at least 1, or -1 for "
            "local_batch_size x the data-parallel degree"
        )
    extreme = getattr(job.config.metrics, "moe_extreme_experts", 0)
    if extreme < 0:
        raise JobError(f"metrics.moe_extreme_experts is {extreme}; it must be at least 0")
    if not job.config.training.max_norm > 0:
        raise JobError(f"training.max_norm is {job.config.training.max_norm}; it must be above 0")


def profile_fits_between_two(job: Job) -> None:
    """Check that warmup and active steps of a profile end before the next one."""
    profiler = job.config.profiler
    steps = profiler.profiler_warmup + profiler.profiler_active
    if profiler.enable_profiling and profiler.profile_freq < steps:
        raise JobError(
            f"profiler.profile_freq is {profiler.profile_freq}; it must be at least profiler_warmup + "
            f"profiler_active = {steps}"
        )


def learning_rate_shrinks(job: Job) -> None:
    """Check that the factors of the learning-rate schedule are from 0 to 1."""
    for name in ("decay_ratio", "min_lr_factor"):
        value = getattr(job.config.lr_scheduler, name)
        if value is not None and not 0 <= value <= 1:
            raise JobError(f"lr_scheduler.{name} is {value}; it must be from 0 to 1")


def seed_checkpoint_is_of_one_process(job: Job) -> None:
    """Check that one process makes a seed checkpoint, with checkpoints enabled."""
    if not job.config.checkpoint.create_seed_checkpoint:
        return
    processes = job.layout.world_size
    if processes > 1:
        raise JobError(
            f"checkpoint.create_seed_checkpoint needs one process, and there are {processes}: set "
            "NGPU=1 and every degree of [parallelism] to 1"
        )
    if not job.config.checkpoint.enable:
        raise JobError("checkpoint.create_seed_checkpoint needs checkpoint.enable = true")


def seed_is_one(job: Job) -> None:
    """Check that ``debug.seed`` is a valid seed."""
    seed = job.config.debug.seed
    if seed is not None and not 0 <= seed < 2**64:
        raise JobError(f"debug.seed is {seed}; it must be at least 0 and below 2**64")


def optimizers_can_be_built(job: Job) -> None:
    """Check that torchtitan has the optimizers, and that a job file can set their arguments."""
    for index, group in enumerate(job.config.optimizer.param_groups):
        name = group.optimizer_name
        key = f"optimizer.param_groups[{index}].optimizer_name is {name!r}"
        try:
            factory = job.config.optimizer._owner._resolve_optimizer_factory(name)
        except NotImplementedError:
            raise JobError(
                f'{key}, which torchtitan does not have: take "Adam" or "AdamW"'
            ) from None
        given = job.config.optimizer.optimizer_factory_kwargs_by_name.get(name, {})
        missing = [
            argument.name
            for argument in inspect.signature(factory).parameters.values()
            if argument.kind is argument.KEYWORD_ONLY
            and argument.default is argument.empty
            and argument.name not in given
        ]
        if missing:
            raise JobError(
                f"{key}, which needs {' and '.join(missing)}, objects that only a config function "
                'can give (optimizer_factory_kwargs_by_name): take "AdamW", or write one'
            )


def optimizer_arguments_fit(job: Job) -> None:
    """Check the patterns of parameters, the names of optimizer arguments, and the learning rates."""
    for index, group in enumerate(job.config.optimizer.param_groups):
        try:
            re.compile(group.pattern)
        except re.error as error:
            raise JobError(
                f"optimizer.param_groups[{index}].pattern is {group.pattern!r}, which is no regular "
                f"expression: {error}"
            ) from None
        optimizer = getattr(torch.optim, group.optimizer_name, None)
        if optimizer is not None:  # torchtitan also has optimizers that torch lacks
            valid = inspect.signature(optimizer).parameters
            for name in group.optimizer_kwargs:
                if name not in valid:
                    raise JobError(
                        f"optimizer.param_groups[{index}].optimizer_kwargs: "
                        f"{group.optimizer_name} has no argument {name!r}; {nearest(name, valid)}"
                    )
        rate = group.optimizer_kwargs.get("lr")
        number = isinstance(rate, (int, float)) and not isinstance(rate, bool)
        if rate is not None and not (number and math.isfinite(rate) and rate >= 0):
            raise JobError(
                f"optimizer.param_groups[{index}].optimizer_kwargs.lr is {rate!r}; "
                "it must be a finite number of at least 0"
            )


def global_batch_divides_over_ranks(job: Job) -> None:
    """Check that the global batch is a multiple of the local batches of all ranks."""
    total = job.config.training.global_batch_size
    if total < 0:
        return
    per_pass = job.config.training.local_batch_size * job.layout.data_ranks
    if total % per_pass:
        raise JobError(
            f"training.global_batch_size {total} is not a multiple of training.local_batch_size "
            f"x data-parallel degree = {job.config.training.local_batch_size} x "
            f"{job.layout.data_ranks}"
        )


def sequence_divides_over_ranks(job: Job) -> None:
    """Check that a sequence divides evenly over TP and CP ranks."""
    tp, cp = (
        job.config.parallelism.tensor_parallel_degree,
        job.config.parallelism.context_parallel_degree,
    )
    divisor = (tp if job.config.parallelism.enable_sequence_parallel else 1) * (
        2 * cp if cp > 1 else 1
    )
    if job.config.training.seq_len % divisor:
        raise JobError(
            f"training.seq_len {job.config.training.seq_len} is not divisible by {divisor}, which "
            f"tensor_parallel_degree {tp} with sequence parallelism and "
            f"context_parallel_degree {cp} (two slices a rank) need"
        )


def flex_attention_takes_the_slices(job: Job) -> None:
    """Check that context parallelism cuts the mask of flex attention between blocks.

    torch raises this error too, but only in the first step.
    """
    cp = job.config.parallelism.context_parallel_degree
    block = cp * FLEX_BLOCK_SIZE
    if cp == 1 or job.config.training.seq_len % block == 0 or job.config.model_spec is None:
        return
    if any(True for _attention in job.config.model_spec.traverse(FlexAttention.Config)):
        raise JobError(
            f"training.seq_len {job.config.training.seq_len} is not divisible by {block}: with "
            f"context_parallel_degree {cp} flex attention needs whole blocks of "
            f"{FLEX_BLOCK_SIZE} tokens on every rank"
        )


def compile_backend_is_known(job: Job) -> None:
    """Check that ``compile.backend`` exists."""
    backends = compiler_backends()
    if job.config.compile.enable and job.config.compile.backend not in backends:
        raise JobError(
            f"compile.backend {job.config.compile.backend!r} does not exist; "
            f"{nearest(job.config.compile.backend, backends)}"
        )


def compile_components_are_known(job: Job) -> None:
    """Check ``compile.components``, of which torchtitan silently ignores unknown names."""
    for component in job.config.compile.components if job.config.compile.enable else ():
        if component not in ("model", "loss"):
            raise JobError(
                f"compile.components {component!r} does not exist; "
                f"{nearest(component, ('model', 'loss'))}"
            )


def states_that_are_not_loaded_are_known(job: Job) -> None:
    """Check that ``checkpoint.exclude_from_loading`` names parts of a checkpoint."""
    for name in job.config.checkpoint.exclude_from_loading if job.config.checkpoint.enable else ():
        if name not in _LEFT_OUT_OF_LOADING:
            raise JobError(
                f"checkpoint.exclude_from_loading {name!r} is no part of a checkpoint; "
                f"{nearest(name, _LEFT_OUT_OF_LOADING)}"
            )


_LEFT_OUT_OF_LOADING = (DATALOADER, LR_SCHEDULER, OPTIMIZER, TRAIN_STATE)

RULES = (
    sizes_are_positive,
    profile_fits_between_two,
    learning_rate_shrinks,
    seed_checkpoint_is_of_one_process,
    seed_is_one,
    optimizers_can_be_built,
    optimizer_arguments_fit,
    global_batch_divides_over_ranks,
    sequence_divides_over_ranks,
    flex_attention_takes_the_slices,
    compile_backend_is_known,
    compile_components_are_known,
    states_that_are_not_loaded_are_known,
)
