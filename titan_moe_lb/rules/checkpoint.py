"""Rules of the distributed checkpoint that a job starts from."""

from __future__ import annotations

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torchtitan.components.checkpointer import TRAIN_STATE

from titan_moe_lb.balancing.router import router_configs
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
from titan_moe_lb.data.loaders import saves_place_by_rank
from titan_moe_lb.errors import JobError
from titan_moe_lb.parallel.layer_numbers import layer_name, moe_layers
from titan_moe_lb.resolved_job import Job


def _resumed(job: Job) -> Checkpoint | None:
    """Return the checkpoint whose training state a job loads; None if it loads weights alone."""
    return None if job.start is None or is_model_only(job.config, job.start) else job.start


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
    start = _resumed(job)
    if start is None or _holds_training_state(start):
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
    start, left_out = _resumed(job), job.config.checkpoint.exclude_from_loading
    if (
        start is None
        or "dataloader" in left_out
        or not saves_place_by_rank(job.config.dataloader._owner)
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
    start, routers = _resumed(job), router_configs(job.config).values()
    if (
        start is None
        or TRAIN_STATE in job.config.checkpoint.exclude_from_loading
        or not any(map(changes_after_tokens, routers))
    ):
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
                state = loss.build().state_dict()
            for name in (f"{fqn}.router.aux_losses.{kind}.{key}" for key in state):
                if name not in saved:
                    raise JobError(
                        f"{start.path} was saved without the {kind.replace('_', '-')} loss (it has "
                        f"no {name}): go on without the loss, or start from Hugging Face weights"
                    )


def checkpoint_has_state_of_gates(job: Job) -> None:
    """Check that a checkpoint to resume from has optimizer state of each gate that learns.

    torchtitan raises in every process where it is missing. State of a gate that the job freezes is
    left out.
    """
    start = _resumed(job)
    if start is None or "optimizer" in job.config.checkpoint.exclude_from_loading:
        return
    saved = [name for name in start.metadata.state_dict_metadata if name.startswith("optimizer.")]
    if not saved:
        return
    for name, parameter in job.meta_model.named_parameters():
        learns = parameter.requires_grad and ".router.gate." in name
        if learns and not any(f".{name}." in one for one in saved):
            raise JobError(
                f"{start.path} was saved with the gate of {layer_name(name)} frozen, so it has no "
                "optimizer state to train it: keep it in [model] freeze.gate, or name the checkpoint "
                "in checkpoint.initial_load_path of a run in another dump_folder, which loads the "
                "weights alone"
            )


RULES = (
    checkpoint_is_there,
    checkpoint_is_whole,
    checkpoint_has_steps_to_go,
    checkpoint_is_of_this_model,
    checkpoint_has_training_state,
    checkpoint_is_of_as_many_data_ranks,
    checkpoint_counts_tokens_of_as_many_ranks,
    checkpoint_has_router_state,
    checkpoint_has_state_of_gates,
)
