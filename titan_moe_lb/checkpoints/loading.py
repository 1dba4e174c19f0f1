"""Checkpoint manager with checked loading and exact balance state.

When torchtitan's own manager saves the model alone, it converts all of it to
``checkpoint.export_dtype``. An expert bias in bfloat16 would route tokens to other experts than
the run did.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.checkpointer.base import MODEL, TRAIN_STATE
from torchtitan.config.override import derive
from torchtitan.trainer import Trainer

from titan_moe_lb.checkpoints.resume_point import TOKEN_RANKS
from titan_moe_lb.parallel.layout import Layout
from titan_moe_lb.terminal.run_folder import is_remote
from titan_moe_lb.upstream.checked_reader import CheckedReader

_BALANCE = re.compile(r"(^|\.)expert_bias_E$|\.router\.(aux_losses|expert_bias)\.")
"""Pattern for the names of expert biases and of the state of losses and bias rules."""


class CheckedCheckpoints(CheckpointManager):
    """Checkpoint manager that checks checkpoints on local disks when it loads them.

    It saves expert biases and the state of losses and bias rules in their own dtypes.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(CheckpointManager.Config):
        """Config of the checkpoint manager."""

    def dcp_save(self, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Save with exact balance state, and with the number of ranks that count tokens."""
        model = self.states[MODEL].state_dict()
        balance = {k: model[k] for k in state_dict if k in model and _BALANCE.search(k)}
        trainer = state_dict.get(TRAIN_STATE)
        if trainer is not None:  # a save of the model alone has none
            layout = Layout.of_dims(trainer.parallel_dims)
            balance[TOKEN_RANKS] = torch.zeros(layout.data_ranks * layout.cp, dtype=torch.uint8)
        return super().dcp_save({**state_dict, **balance}, *args, **kwargs)

    def dcp_load(
        self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool
    ) -> None:
        """Load a local distributed checkpoint with checks; load any other as torchtitan does."""
        if from_hf or is_remote(checkpoint_id):
            super().dcp_load(state_dict, checkpoint_id, from_hf, from_quantized)
            return
        dcp.load(state_dict, storage_reader=CheckedReader(checkpoint_id))
        self.states[MODEL].load_state_dict(state_dict)


def adapt(config: Trainer.Config) -> None:
    """Replace torchtitan's own checkpoint manager in a job, in place; keep any other."""
    if type(config.checkpoint) is CheckpointManager.Config:
        config.checkpoint = derive(config.checkpoint, CheckedCheckpoints.Config)
