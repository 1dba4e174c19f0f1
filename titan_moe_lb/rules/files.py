"""Checks of files, programs and devices on the machine of the job, before any process starts."""

from __future__ import annotations

import importlib
import os

import psutil
import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torchtitan.components.checkpointer import TRAIN_STATE
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from titan_moe_lb.balancing.router import LoadBalancedRouter
from titan_moe_lb.balancing.value_schedule import changes_after_tokens
from titan_moe_lb.checkpoints.resume_point import (
    TOKEN_RANKS,
    Checkpoint,
    damage,
    is_model_only,
    own_folder,
    remedy,
    steps_in,
)
from titan_moe_lb.data.loaders import data_sets, is_text, saves_place_by_rank
from titan_moe_lb.errors import JobError, nearest
from titan_moe_lb.parallel.layer_numbers import moe_layers
from titan_moe_lb.resolved_job import Job
from titan_moe_lb.rules.compiler import compiler_is_here
from titan_moe_lb.rules.frozen_gates import checkpoint_has_state_of_gates
from titan_moe_lb.rules.hugging_face import check_initial_weights
from titan_moe_lb.telemetry.metrics_processor import LoadBalanceMetricsProcessor


def validate_files(job: Job) -> None:
    """Check the files, programs and devices that a job needs.

    Raises:
        JobError: the first one that is missing or does not fit the job.
    """
    compiler_is_here(job)
    device_is_here(job)
    assets_are_here(job)
    datasets_are_known(job)
    domains_are_known(job)
    batch_fits_in_memory(job)
    overrides_are_there(job)
    checkpoint_is_there(job)
    checkpoint_is_whole(job)
    checkpoint_has_steps_to_go(job)
    checkpoint_is_of_this_model(job)
    checkpoint_has_training_state(job)
    checkpoint_is_of_as_many_data_ranks(job)
    checkpoint_counts_tokens_of_as_many_ranks(job)
    checkpoint_has_router_state(job)
    checkpoint_has_state_of_gates(job)
    check_initial_weights(job)


def device_is_here(job: Job) -> None:
    """Refuse settings that need a GPU on a machine without one.

    torch raises these errors too, but only at the start or in the first save.
    """
    if torch.accelerator.is_available():
        return
    if job.config.training.enable_cpu_offload:
        raise JobError(
            "training.enable_cpu_offload needs a GPU, and none is here: leave it out, the "
            "parameters are on the host already"
        )
    checkpoint = job.config.checkpoint
    if checkpoint.enable and getattr(checkpoint, "async_mode", "") == "async_with_pinned_mem":
        raise JobError(
            "checkpoint.async_mode 'async_with_pinned_mem' needs a GPU, and none is here: take "
            "'async' or 'disabled'"
        )


def assets_are_here(job: Job) -> None:
    """Check that ``hf_assets_path`` is a folder with a tokenizer."""
    if not os.path.isdir(job.config.hf_assets_path):
        raise JobError(
            f"hf_assets_path {job.config.hf_assets_path!r} is not a folder: download the model's "
            "tokenizer files there, or name a folder that holds a tokenizer.json"
        )
    files = ("tokenizer.json", "vocab.json", "vocab.txt")
    found = [
        name for name in files if os.path.isfile(os.path.join(job.config.hf_assets_path, name))
    ]
    if isinstance(job.config.tokenizer, HuggingFaceTokenizer.Config) and not found:
        raise JobError(
            f"hf_assets_path {job.config.hf_assets_path!r} contains no tokenizer: none of "
            f"{', '.join(files)}"
        )


def datasets_are_known(job: Job) -> None:
    """Check that the data sets of training and validation exist."""
    loaders = {"dataloader": job.config.dataloader}
    if job.config.validator.enable:
        loaders["validator.dataloader"] = job.config.validator.dataloader
    for place, loader in loaders.items():
        if is_text(loader) and loader.dataset not in data_sets():
            raise JobError(
                f"{place}.dataset {loader.dataset!r} does not exist; "
                f"{nearest(loader.dataset, data_sets())}"
            )
        path = getattr(loader, "dataset_path", None)
        if path and path.startswith(("/", ".", "~")) and not os.path.exists(path):
            raise JobError(f"{place}.dataset_path {path}: there is no such file or folder")


def domains_are_known(job: Job) -> None:
    """Check that the data sets of ``validator.domains`` exist and that their load is recorded."""
    domains = getattr(job.config.validator, "domains", [])
    if not job.config.validator.enable or not domains:
        return
    if not is_text(job.config.validator.dataloader):
        raise JobError(
            "validator.domains takes the place of validator.dataloader.dataset, and this loader "
            "has none: leave domains empty"
        )
    for domain in domains:
        if domain not in data_sets():
            raise JobError(
                f"validator.domains {domain!r} does not exist; {nearest(domain, data_sets())}"
            )
    if not isinstance(job.config.metrics, LoadBalanceMetricsProcessor.Config):
        raise JobError(
            "validator.domains needs LoadBalanceMetricsProcessor.Config as the job's metrics: "
            "its sinks are where the load of the domains goes"
        )
    if len(set(domains)) < len(domains):
        raise JobError(f"validator.domains names one dataset twice: {', '.join(domains)}")


def batch_fits_in_memory(job: Job) -> None:
    """Check that the token ids of a local batch fit in memory; the model's need is not known."""
    training = job.config.training
    size = training.local_batch_size * training.seq_len * torch.int64.itemsize
    memory = psutil.virtual_memory().total
    if size > memory:
        raise JobError(
            f"training.local_batch_size {training.local_batch_size:,} x training.seq_len "
            f"{training.seq_len:,} tokens need {size / 2**30:,.0f} GiB for their ids alone, and "
            f"this machine has {memory / 2**30:,.0f} GiB: reduce one of them"
        )


def overrides_are_there(job: Job) -> None:
    """Check that the functions of ``override.imports`` can be imported."""
    for entry in job.config.override.imports:
        target = entry if isinstance(entry, str) else entry[0]
        module, _dot, function = target.rpartition(".")
        try:
            found = hasattr(importlib.import_module(module or function), function)
        except ImportError as error:
            raise JobError(f"override.imports {target}: {error}") from None
        if not found:
            raise JobError(f"override.imports {target}: {module} has no {function!r}")


def checkpoint_is_there(job: Job) -> None:
    """Check that the folder of the checkpoint to load exists."""
    start = job.start
    if start is None or start.path.is_dir():
        return
    if start.step is None:
        raise JobError(f"checkpoint.initial_load_path {start.path}: there is no such folder")
    folder = own_folder(job.config)
    steps = ", ".join(map(str, steps_in(folder))) or "none"
    raise JobError(
        f"checkpoint.load_step is {start.step}, and {folder} has no such step; it has: {steps}"
    )


def checkpoint_is_whole(job: Job) -> None:
    """Check that no file of the checkpoint is missing or cut."""
    if job.start is None:
        return
    problem = damage(job.start)
    if problem is not None:
        raise JobError(f"{problem}; {remedy(own_folder(job.config), job.start.path)}")


def checkpoint_has_steps_to_go(job: Job) -> None:
    """Check that ``training.steps`` is larger than the step of the checkpoint."""
    start, steps = job.start, job.config.training.steps
    if start is not None and start.step is not None and start.step >= steps:
        raise JobError(
            f"training.steps is {steps}, and {start.path} is already at step {start.step}: set it higher to "
            "go on, or begin again in another dump_folder"
        )


def checkpoint_is_of_this_model(job: Job) -> None:
    """Compare names and shapes of the weights in the checkpoint and in the model.

    :func:`checkpoint_has_router_state` checks the expert biases and the state of losses.
    """
    start, spec = job.start, job.config.model_spec
    if start is None or spec is None:
        return
    saved = start.metadata.state_dict_metadata
    for name, value in job.meta_model.state_dict().items():
        if ".expert_bias" in name or ".aux_losses." in name or not torch.is_tensor(value):
            continue
        stored = saved.get(name)
        there = tuple(stored.size) if isinstance(stored, TensorStorageMetadata) else None
        if there != tuple(value.shape):
            has = f"has {name} of shape {there}" if there else f"has no {name}"
            raise JobError(
                f"{start.path} {has}, which has shape {tuple(value.shape)} in {spec.name} "
                f"{spec.flavor}: it is of another model or flavor"
            )


def checkpoint_has_training_state(job: Job) -> None:
    """Check that a checkpoint to resume from contains the training state.

    A last step may contain the weights alone, from which torchtitan cannot resume.
    """
    start = job.start
    if start is None or is_model_only(job.config, start) or _holds_training_state(start):
        return
    steps = [
        Checkpoint(path=path, step=step)
        for step, path in steps_in(own_folder(job.config)).items()
        if step
    ]
    whole = [one.step for one in steps if damage(one) is None and _holds_training_state(one)]
    resume = f"set checkpoint.load_step = {whole[-1]} to go on from there, or " if whole else ""
    raise JobError(
        f"{start.path} holds the weights alone (checkpoint.last_save_model_only), without the "
        f"state of optimizer and data: {resume}name it in checkpoint.initial_load_path of a run "
        "in another dump_folder"
    )


def _holds_training_state(checkpoint: Checkpoint) -> bool:
    saved = checkpoint.metadata.state_dict_metadata
    return any(name.startswith(f"{TRAIN_STATE}.") for name in saved)


def checkpoint_is_of_as_many_data_ranks(job: Job) -> None:
    """Check that the number of data-parallel ranks is the same as in the checkpoint.

    torchtitan 0.3.0 cannot redistribute the position in the data over other ranks
    (https://github.com/pytorch/torchtitan/issues/811).
    """
    start, loader = job.start, job.config.dataloader._owner
    if (
        start is None
        or is_model_only(job.config, start)
        or "dataloader" in job.config.checkpoint.exclude_from_loading
        or not saves_place_by_rank(loader)
    ):
        return
    before, now = _data_ranks_of(start), job.layout.data_ranks
    if before != now:
        steps = f"the first {start.step} steps" if start.step else "the steps before"
        raise JobError(
            f"{start.path} holds the place in the data of {before} data-parallel rank(s), and this "
            f"job has {now} (parallelism.data_parallel_replicate_degree x "
            f"data_parallel_shard_degree): go on with {before}, or set "
            'checkpoint.exclude_from_loading = ["dataloader"], which begins the data again and '
            f"repeats the samples of {steps}"
        )


def checkpoint_counts_tokens_of_as_many_ranks(job: Job) -> None:
    """Check that as many ranks count tokens as in the checkpoint.

    torchtitan 0.3.0 saves ``ntokens_seen`` of one rank, without the number of ranks. Only changes
    of losses and bias rules after a number of tokens depend on it.
    """
    start, checkpoint = job.start, job.config.checkpoint
    if (
        start is None
        or is_model_only(job.config, start)
        or TRAIN_STATE in checkpoint.exclude_from_loading
    ):
        return
    routers = job.config.model_spec.model.traverse(LoadBalancedRouter.Config)
    if not any(changes_after_tokens(router) for _fqn, router, *_ in routers):
        return
    stored = start.metadata.state_dict_metadata.get(TOKEN_RANKS)
    before, now = _data_ranks_of(start), job.layout.data_ranks
    degrees = "data_parallel_replicate_degree x data_parallel_shard_degree"
    if isinstance(stored, TensorStorageMetadata):  # an older checkpoint does not name the CP degree
        (before,), now = stored.size, now * job.layout.cp
        degrees += " x context_parallel_degree"
    if before not in (0, now):
        raise JobError(
            f"changes of aux_losses or expert_bias after tokens: {start.path} has the tokens that one "
            f"of {before} rank(s) has seen (parallelism.{degrees}), and this job has {now} such "
            f"rank(s), so that their sum is not known: go on with {before}, or give the changes in "
            "steps, as in {step = 1000, value = 0.0}"
        )


def _data_ranks_of(checkpoint: Checkpoint) -> int:
    saved = checkpoint.metadata.state_dict_metadata
    return sum(name.startswith("dataloader.dp_rank_") for name in saved)


def checkpoint_has_router_state(job: Job) -> None:
    """Check that checkpoint and job have the same expert biases, and the job's loss states.

    They are model state. torchtitan raises in every process if the checkpoint lacks a name, and
    silently drops a name that the model lacks.
    """
    start = job.start
    if start is None:
        return
    saved = start.metadata.state_dict_metadata
    for fqn, moe in moe_layers(job.config.model_spec.model).items():
        bias = f"{fqn}.expert_bias_E"
        if moe.load_balance_coeff is None and bias in saved:
            raise JobError(
                f"{start.path} was saved with an expert bias ({bias}) and this job has none, "
                "which would drop what was learned: keep it with expert_bias = "
                '{type = "frozen"}, or leave it behind with {type = "frozen", reset = true}'
            )
        if moe.load_balance_coeff is not None and bias not in saved:
            raise JobError(
                f"{start.path} was saved without an expert bias (it has no {bias}) and this job "
                'has one: go on without, with expert_bias = "none"'
            )
        for loss in getattr(moe.router, "aux_losses", []):
            kind = loss._owner.type_name
            with torch.device("meta"):
                state = [
                    f"{fqn}.router.aux_losses.{kind}.{name}" for name in loss.build().state_dict()
                ]
            for name in state:
                if name not in saved:
                    raise JobError(
                        f"{start.path} was saved without the {kind.replace('_', '-')} loss (it has "
                        f"no {name}): go on without the loss, or start from Hugging Face weights"
                    )
