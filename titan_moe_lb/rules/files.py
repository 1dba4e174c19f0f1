"""Files, programs and devices that a job starts from. Asked where it runs, before any process starts."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import psutil
import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torchtitan.components.checkpointer import TRAIN_STATE
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.hf_datasets.text_datasets import DATASETS, HuggingFaceTextDataLoader
from torchtitan.models.common.moe import MoE
from torchtitan.trainer import Trainer

from titan_moe_lb.balancing.router import LoadBalancedRouter
from titan_moe_lb.balancing.value_schedule import changes_after_tokens
from titan_moe_lb.checkpoints.start import (
    damage,
    is_model_only,
    own_folder,
    read_metadata,
    remedy,
    start_of,
    steps_in,
)
from titan_moe_lb.errors import JobError, nearest
from titan_moe_lb.parallel import layout
from titan_moe_lb.rules.compiler import compiler_is_here
from titan_moe_lb.rules.hugging_face import check_initial_weights
from titan_moe_lb.rules.meta_model import meta_state
from titan_moe_lb.telemetry.metrics_processor import LoadBalanceMetricsProcessor


def validate_files(config: Trainer.Config) -> None:
    """Raises ``JobError``: the first thing about the job's files that cannot work."""
    compiler_is_here(config)
    device_is_here(config)
    assets_are_here(config)
    datasets_are_known(config)
    domains_are_known(config)
    batch_fits_in_memory(config)
    overrides_are_there(config)
    checkpoint_is_there(config)
    checkpoint_is_whole(config)
    checkpoint_has_steps_to_go(config)
    checkpoint_is_of_this_model(config)
    checkpoint_has_training_state(config)
    checkpoint_is_of_as_many_data_ranks(config)
    checkpoint_counts_tokens_of_as_many_ranks(config)
    checkpoint_has_router_state(config)
    check_initial_weights(config)


def device_is_here(config: Trainer.Config) -> None:
    """Torch refuses these at the start, or in the first save."""
    if torch.accelerator.is_available():
        return
    if config.training.enable_cpu_offload:
        raise JobError(
            "training.enable_cpu_offload needs a GPU, and none is here: leave it out, the "
            "parameters are on the host already"
        )
    checkpoint = config.checkpoint
    if checkpoint.enable and getattr(checkpoint, "async_mode", "") == "async_with_pinned_mem":
        raise JobError(
            "checkpoint.async_mode 'async_with_pinned_mem' needs a GPU, and none is here: take "
            "'async' or 'disabled'"
        )


def assets_are_here(config: Trainer.Config) -> None:
    if not os.path.isdir(config.hf_assets_path):
        raise JobError(
            f"hf_assets_path {config.hf_assets_path!r} is not a folder: download the model's "
            "tokenizer files there, or name a folder that holds a tokenizer.json"
        )
    files = ("tokenizer.json", "vocab.json", "vocab.txt")
    found = [name for name in files if os.path.isfile(os.path.join(config.hf_assets_path, name))]
    if isinstance(config.tokenizer, HuggingFaceTokenizer.Config) and not found:
        raise JobError(
            f"hf_assets_path {config.hf_assets_path!r} holds no tokenizer: none of "
            f"{', '.join(files)}"
        )


def datasets_are_known(config: Trainer.Config) -> None:
    loaders = {"dataloader": config.dataloader}
    if config.validator.enable:
        loaders["validator.dataloader"] = config.validator.dataloader
    for place, loader in loaders.items():
        if isinstance(loader, HuggingFaceTextDataLoader.Config) and loader.dataset not in DATASETS:
            raise JobError(
                f"{place}.dataset {loader.dataset!r} does not exist; "
                f"{nearest(loader.dataset, DATASETS)}"
            )
        path = getattr(loader, "dataset_path", None)
        if path and path.startswith(("/", ".", "~")) and not os.path.exists(path):
            raise JobError(f"{place}.dataset_path {path}: there is no such file or folder")


def domains_are_known(config: Trainer.Config) -> None:
    domains = getattr(config.validator, "domains", [])
    if not config.validator.enable or not domains:
        return
    if not isinstance(config.validator.dataloader, HuggingFaceTextDataLoader.Config):
        raise JobError(
            "validator.domains takes the place of validator.dataloader.dataset, and this loader "
            "has none: leave domains empty"
        )
    for domain in domains:
        if domain not in DATASETS:
            raise JobError(
                f"validator.domains {domain!r} does not exist; {nearest(domain, DATASETS)}"
            )
    if not isinstance(config.metrics, LoadBalanceMetricsProcessor.Config):
        raise JobError(
            "validator.domains needs LoadBalanceMetricsProcessor.Config as the job's metrics: "
            "its sinks are where the load of the domains goes"
        )
    if len(set(domains)) < len(domains):
        raise JobError(f"validator.domains names one dataset twice: {', '.join(domains)}")


def batch_fits_in_memory(config: Trainer.Config) -> None:
    """The ids of the tokens alone: what the model needs, nobody knows before it has run."""
    training = config.training
    size = training.local_batch_size * training.seq_len * torch.int64.itemsize
    memory = psutil.virtual_memory().total
    if size > memory:
        raise JobError(
            f"training.local_batch_size {training.local_batch_size:,} x training.seq_len "
            f"{training.seq_len:,} tokens need {size / 2**30:,.0f} GiB for their ids alone, and "
            f"this machine has {memory / 2**30:,.0f} GiB: take a smaller one"
        )


def overrides_are_there(config: Trainer.Config) -> None:
    for entry in config.override.imports:
        target = entry if isinstance(entry, str) else entry[0]
        module, _dot, function = target.rpartition(".")
        try:
            found = hasattr(importlib.import_module(module or function), function)
        except ImportError as error:
            raise JobError(f"override.imports {target}: {error}") from None
        if not found:
            raise JobError(f"override.imports {target}: {module} has no {function!r}")


def checkpoint_is_there(config: Trainer.Config) -> None:
    start = start_of(config)
    if start is None or start.path.is_dir():
        return
    if start.step is None:
        raise JobError(f"checkpoint.initial_load_path {start.path}: there is no such folder")
    folder = own_folder(config)
    steps = ", ".join(map(str, steps_in(folder))) or "none"
    raise JobError(
        f"checkpoint.load_step is {start.step}, and {folder} has no such step; it has: {steps}"
    )


def checkpoint_is_whole(config: Trainer.Config) -> None:
    start = start_of(config)
    if start is None:
        return
    problem = damage(start.path)
    if problem is not None:
        raise JobError(f"{problem}; {remedy(own_folder(config), start.path)}")


def checkpoint_has_steps_to_go(config: Trainer.Config) -> None:
    start, steps = start_of(config), config.training.steps
    if start is not None and start.step is not None and start.step >= steps:
        raise JobError(
            f"training.steps is {steps}, and {start.path} has done {start.step}: set it higher to "
            "go on, or begin again in another dump_folder"
        )


def checkpoint_is_of_this_model(config: Trainer.Config) -> None:
    """Names and shapes of all weights, except what :func:`checkpoint_has_router_state` asks."""
    start, spec = start_of(config), config.model_spec
    if start is None or spec is None:
        return
    saved = read_metadata(start.path).state_dict_metadata
    _model_config, state = meta_state(config)
    for name, value in state.items():
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


def checkpoint_has_training_state(config: Trainer.Config) -> None:
    """A last step may hold the weights alone, and torchtitan goes on from whole states alone."""
    start = start_of(config)
    if start is None or is_model_only(config, start):
        return
    if not _holds_training_state(start.path):
        folder = own_folder(config)
        whole = [
            step
            for step, path in steps_in(folder).items()
            if step and damage(path) is None and _holds_training_state(path)
        ]
        go_on = f"set checkpoint.load_step = {whole[-1]} to go on from there, or " if whole else ""
        raise JobError(
            f"{start.path} holds the weights alone (checkpoint.last_save_model_only), without the "
            f"state of optimizer and data: {go_on}name it in checkpoint.initial_load_path of a run "
            "in another dump_folder"
        )


def _holds_training_state(path: Path) -> bool:
    saved = read_metadata(path).state_dict_metadata
    return any(name.startswith(f"{TRAIN_STATE}.") for name in saved)


def checkpoint_is_of_as_many_data_ranks(config: Trainer.Config) -> None:
    """torchtitan 0.3.0 cannot divide the place in the data over other ranks
    (https://github.com/pytorch/torchtitan/issues/811)."""
    start, loader = start_of(config), config.dataloader._owner
    if (
        start is None
        or is_model_only(config, start)
        or "dataloader" in config.checkpoint.exclude_from_loading
        or not issubclass(loader, ParallelAwareDataloader)
    ):
        return
    before, now = _data_ranks(config, start.path)
    if before != now:
        steps = f"the first {start.step} steps" if start.step else "the steps before"
        raise JobError(
            f"{start.path} holds the place in the data of {before} data-parallel rank(s), and this "
            f"job has {now} (parallelism.data_parallel_replicate_degree x "
            f"data_parallel_shard_degree): go on with {before}, or set "
            'checkpoint.exclude_from_loading = ["dataloader"], which begins the data again and '
            f"repeats the samples of {steps}"
        )


def checkpoint_counts_tokens_of_as_many_ranks(config: Trainer.Config) -> None:
    """torchtitan 0.3.0 saves the tokens of one rank, ``ntokens_seen``, and not of how many."""
    start, checkpoint = start_of(config), config.checkpoint
    if (
        start is None
        or is_model_only(config, start)
        or TRAIN_STATE in checkpoint.exclude_from_loading
    ):
        return
    routers = config.model_spec.model.traverse(LoadBalancedRouter.Config)  # type: ignore[union-attr]
    if not any(changes_after_tokens(router) for _fqn, router, *_ in routers):
        return
    before, now = _data_ranks(config, start.path)
    if before not in (0, now):
        raise JobError(
            f"{start.path} counts the tokens of {before} data-parallel rank(s), each its own, and "
            f"this job has {now}, so that nobody knows when {{tokens = ...}} is reached: give the "
            "changes of losses and expert bias in steps"
        )


def _data_ranks(config: Trainer.Config, checkpoint: Path) -> tuple[int, int]:
    """The data-parallel ranks that a checkpoint is of, and those of the job."""
    saved = read_metadata(checkpoint).state_dict_metadata
    dims = layout.resolve(config.parallelism)
    before = sum(name.startswith("dataloader.dp_rank_") for name in saved)
    return before, dims.dp_replicate * dims.dp_shard


def checkpoint_has_router_state(config: Trainer.Config) -> None:
    """Expert biases and what losses remember are model state, which torchtitan loads whole: a
    name too few is a traceback in every process, one too many is dropped."""
    start = start_of(config)
    if start is None:
        return
    saved = read_metadata(start.path).state_dict_metadata
    for fqn, moe, _parent, _attribute in config.model_spec.model.traverse(MoE.Config):  # type: ignore[union-attr]
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
