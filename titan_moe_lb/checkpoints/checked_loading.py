"""torchtitan's checkpoints of a balanced model: checked when they are read, exact in its balance.

``torch.save`` writes a CRC-32 into every record of a checkpoint, and ``torch.load`` does not
look at it: a flipped bit of a weight would be trained on. Each rank reads what it loads twice,
the second time from the page cache.

``checkpoint.export_dtype`` is for weights. Rounded to bfloat16, an expert bias would send tokens
to other experts than those of the run.
"""

from __future__ import annotations

import io
import os
import re
import zipfile
import zlib
from dataclasses import dataclass
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.checkpointer.base import MODEL
from torchtitan.config.override import derive
from torchtitan.tools import filesystem
from torchtitan.trainer import Trainer

from titan_moe_lb.errors import JobError

_BALANCE = re.compile(r"(^|\.)expert_bias_E$|\.router\.(aux_losses|expert_bias)\.")
"""Names of the expert bias, and of the state of losses and bias rules."""


class CheckedReader(FileSystemReader):
    """Raises ``JobError`` at the first record that is not what was saved."""

    def _slice_file(self, file: Any, sinfo: Any) -> Any:
        found = super()._slice_file(file, sinfo)
        try:
            with zipfile.ZipFile(_FromItsEnd(found)) as archive:
                broken = archive.testzip()
        except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, ValueError) as error:
            broken = str(error)
        if broken is not None:
            raise JobError(
                f"{os.path.join(self.path, sinfo.relative_path)} is damaged: its bytes "
                f"{sinfo.offset:,} to {sinfo.offset + sinfo.length:,} are not what was saved"
            )
        found.seek(0)
        return found


class _FromItsEnd(io.RawIOBase):
    """A slice of a file that can be sought from its end, which torch 2.14's goes beyond."""

    def __init__(self, view: Any) -> None:
        self._view = view

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._view.tell()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.tell(), os.SEEK_END: self._view.len}[whence]
        if start + offset < 0:
            raise ValueError("before the beginning")
        self._view.seek(start + offset)
        return start + offset

    def read(self, size: int | None = -1) -> bytes:
        return self._view.read(-1 if size is None else size)


class CheckedCheckpoints(CheckpointManager):
    """torchtitan's, with a reader that checks what it reads from this machine's disks, and the
    state of the balance in its own dtype."""

    @dataclass(kw_only=True, slots=True)
    class Config(CheckpointManager.Config):
        pass

    def dcp_save(self, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        model = self.states[MODEL].state_dict()
        balance = {k: model[k] for k in state_dict if k in model and _BALANCE.search(k)}
        return super().dcp_save({**state_dict, **balance}, *args, **kwargs)

    def dcp_load(
        self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool
    ) -> None:
        if from_hf or filesystem.is_remote(checkpoint_id):
            super().dcp_load(state_dict, checkpoint_id, from_hf, from_quantized)
            return
        dcp.load(state_dict, storage_reader=CheckedReader(checkpoint_id))
        self.states[MODEL].load_state_dict(state_dict)


def adapt(config: Trainer.Config) -> None:
    """Take these checkpoints in a job that has torchtitan's first; others are left alone."""
    if type(config.checkpoint) is CheckpointManager.Config:
        config.checkpoint = derive(config.checkpoint, CheckedCheckpoints.Config)
