"""Rules of sizes, layout, optimizer, compiler and checkpoint of a job."""

from __future__ import annotations

import inspect
import math
import re

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
    "metrics.moe_extreme_experts",
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
    """Check the optimizers and their arguments, the patterns of parameters and the learning rates."""
    optimizer = job.config.optimizer
    for index, group in enumerate(optimizer.param_groups):
        key, name = f"optimizer.param_groups[{index}]", group.optimizer_name
        try:
            re.compile(group.pattern)
        except re.error as error:
            raise JobError(
                f"{key}.pattern is {group.pattern!r}, which is no regular expression: {error}"
            ) from None
        given = group.optimizer_kwargs | optimizer.optimizer_factory_kwargs_by_name.get(name, {})
        try:
            arguments = inspect.signature(optimizer._owner._resolve_optimizer_factory(name))
            known = list(arguments.parameters)[1:]  # the first are the parameters of the model
            kinds = {one.kind for one in arguments.parameters.values()}
            wrong = [argument for argument in given if argument not in known]
            if wrong and inspect.Parameter.VAR_KEYWORD not in kinds:
                raise JobError(
                    f"{key}.optimizer_kwargs: {name} has no argument {wrong[0]!r}; "
                    f"{nearest(wrong[0], known)}"
                )
            arguments.bind(None, **given)
        except NotImplementedError:
            raise JobError(
                f'{key}.optimizer_name is {name!r}, which torchtitan does not have: take "AdamW" or "Adam"'
            ) from None
        except TypeError as error:
            raise JobError(
                f"{key}.optimizer_name is {name!r}, and optimizer_kwargs: {error}; its arguments are "
                f"{', '.join(known)} (objects: optimizer_factory_kwargs_by_name of a "
                'config function), or take "AdamW"'
            ) from None
        rate = given.get("lr", 0.0)
        number = isinstance(rate, (int, float)) and not isinstance(rate, bool)
        if not (number and math.isfinite(rate) and rate >= 0):
            raise JobError(
                f"{key}.optimizer_kwargs.lr is {rate!r}; it must be a finite number of at least 0"
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


def names_are_known(job: Job) -> None:
    """Check names that torchtitan silently ignores, or refuses only once the model is built."""
    named = []
    if job.config.compile.enable:
        backend, components = job.config.compile.backend, job.config.compile.components
        named.append(("compile.backend", [backend], compiler_backends()))
        named.append(("compile.components", components, ["model", "loss"]))
    if job.config.checkpoint.enable:
        states = [DATALOADER, LR_SCHEDULER, OPTIMIZER, TRAIN_STATE]
        left_out = job.config.checkpoint.exclude_from_loading
        named.append(("checkpoint.exclude_from_loading", left_out, states))
    for key, names, valid in named:
        for name in names:
            if name not in valid:
                raise JobError(f"{key} {name!r} does not exist; {nearest(name, valid)}")


RULES = (
    sizes_are_positive,
    profile_fits_between_two,
    learning_rate_shrinks,
    seed_checkpoint_is_of_one_process,
    seed_is_one,
    optimizers_can_be_built,
    global_batch_divides_over_ranks,
    sequence_divides_over_ranks,
    flex_attention_takes_the_slices,
    names_are_known,
)
