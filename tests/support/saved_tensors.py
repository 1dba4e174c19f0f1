"""Tensors of a checkpoint, read in one process."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.format_utils import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict


def tensors(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Weights, biases, state of losses, rules and optimizer."""
    state: dict = {}
    _load_state_dict(
        state,
        storage_reader=FileSystemReader(folder / "checkpoint" / f"step-{step}"),
        planner=_EmptyStateDictLoadPlanner(),
        no_dist=True,
    )
    return _flat(state)


def _flat(tree: dict, prefix: str = "") -> dict[str, torch.Tensor]:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, torch.Tensor):
            flat[f"{prefix}{key}"] = value
    return flat
