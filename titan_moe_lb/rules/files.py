"""Files that a job starts from. Asked where it runs, before any process starts."""

from __future__ import annotations

import os
import re
from pathlib import Path

from torch.distributed.checkpoint import FileSystemReader
from torchtitan.trainer import Trainer

from titan_moe_lb.errors import JobError
from titan_moe_lb.losses import GlobalBatchAuxLoss
from titan_moe_lb.router import LoadBalancedRouter
from titan_moe_lb.rules.hugging_face import check_initial_weights


def validate_files(config: Trainer.Config) -> None:
    """Raises ``JobError``: the first thing about the job's files that cannot work."""
    assets_are_here(config)
    checkpoint_has_loss_state(config)
    check_initial_weights(config)


def assets_are_here(config: Trainer.Config) -> None:
    if not os.path.isdir(config.hf_assets_path):
        raise JobError(
            f"hf_assets_path {config.hf_assets_path!r} is not a folder: download the model's "
            "tokenizer files there, or name a folder that holds a tokenizer.json"
        )


def checkpoint_has_loss_state(config: Trainer.Config) -> None:
    """The counts of the global-batch loss are model state, which torchtitan loads whole."""
    folder = _starting_checkpoint(config)
    if folder is None:
        return
    needed = [
        f"{fqn}.aux_losses.{GlobalBatchAuxLoss.type_name}.counts_E"
        for fqn, router, _parent, _attribute in config.model_spec.model.traverse(  # type: ignore[union-attr]
            LoadBalancedRouter.Config
        )
        for loss in router.aux_losses
        if isinstance(loss, GlobalBatchAuxLoss.Config) and loss.counts == "previous_step"
    ]
    saved = FileSystemReader(folder).read_metadata().state_dict_metadata if needed else {}
    for name in needed:
        if name not in saved:
            raise JobError(
                f"{folder} was saved without the global-batch loss (it has no {name}): go on "
                "without the loss, start from Hugging Face weights, or take "
                'counts = "running", which keeps no state'
            )


def _starting_checkpoint(config: Trainer.Config) -> Path | None:
    """The distributed checkpoint that the job loads first, as torchtitan chooses it."""
    checkpoint = config.checkpoint
    if not checkpoint.enable or checkpoint.create_seed_checkpoint:
        return None
    saved = {
        int(match[1]): path
        for path in Path(config.dump_folder, checkpoint.folder).glob("step-*")
        if (match := re.fullmatch(r"step-(\d+)", path.name)) and (path / ".metadata").is_file()
    }
    if saved:
        return saved.get(checkpoint.load_step, saved[max(saved)])
    if checkpoint.initial_load_path and not checkpoint.initial_load_in_hf:
        path = Path(checkpoint.initial_load_path)
        return path if (path / ".metadata").is_file() else None
    return None
