"""Files that a job starts from. Asked where it runs, before any process starts."""

from __future__ import annotations

import os

from torchtitan.models.common.moe import MoE
from torchtitan.tools.logging import logger
from torchtitan.trainer import Trainer

from titan_moe_lb import checkpoints
from titan_moe_lb.errors import JobError
from titan_moe_lb.losses import GlobalBatchAuxLoss
from titan_moe_lb.rules.hugging_face import check_initial_weights


def validate_files(config: Trainer.Config) -> None:
    """Raises ``JobError``: the first thing about the job's files that cannot work."""
    assets_are_here(config)
    checkpoint_is_whole(config)
    checkpoint_has_router_state(config)
    check_initial_weights(config)


def assets_are_here(config: Trainer.Config) -> None:
    if not os.path.isdir(config.hf_assets_path):
        raise JobError(
            f"hf_assets_path {config.hf_assets_path!r} is not a folder: download the model's "
            "tokenizer files there, or name a folder that holds a tokenizer.json"
        )


def checkpoint_is_whole(config: Trainer.Config) -> None:
    start = checkpoints.start_of(config)
    folder = checkpoints.own_folder(config)
    steps = checkpoints.steps_in(folder) if config.checkpoint.enable else {}
    if start is None:
        if steps and not config.checkpoint.create_seed_checkpoint:
            step, path = steps.popitem()
            raise JobError(
                f"{checkpoints.damage(path)}: no step in {folder} can be loaded, and training "
                "would start from the beginning; for that, take the folder away"
            )
        return
    problem = checkpoints.damage(start.path)
    if problem is not None:
        others = steps if start.step is not None else checkpoints.steps_in(start.path.parent)
        good = (
            (step, path)
            for step, path in reversed(others.items())
            if path != start.path and checkpoints.damage(path) is None
        )
        step, path = next(good, (None, None))
        flag = "load_step" if start.step is not None else "initial_load_path"
        value = step if start.step is not None else path
        remedy = (
            f"the last good step in {others[step].parent} is {step}: set checkpoint.{flag} = {value}"
            if step is not None
            else f"no other step beside it is whole; take {start.path} away to start without it"
        )
        raise JobError(f"{problem}; {remedy}")
    for step, path in steps.items():
        if start.step is not None and step > start.step and config.checkpoint.load_step == -1:
            logger.warning(
                f"titan_moe_lb: note: {checkpoints.damage(path)}: training goes on from step "
                f"{start.step}, the last good one (checkpoint.load_step chooses another)"
            )


def checkpoint_has_router_state(config: Trainer.Config) -> None:
    """Expert biases and the counts of the global-batch loss are model state, which torchtitan
    loads whole: a name too few is a traceback in every process, one too many is dropped."""
    start = checkpoints.start_of(config)
    if start is None:
        return
    saved = checkpoints.read_metadata(start.path).state_dict_metadata
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
            counts = f"{fqn}.router.aux_losses.{GlobalBatchAuxLoss.type_name}.counts_E"
            if (
                isinstance(loss, GlobalBatchAuxLoss.Config)
                and loss.counts == "previous_step"
                and counts not in saved
            ):
                raise JobError(
                    f"{start.path} was saved without the global-batch loss (it has no {counts}): "
                    "go on without the loss, start from Hugging Face weights, or take "
                    'counts = "running", which keeps no state'
                )
