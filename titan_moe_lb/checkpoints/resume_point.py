"""Checkpoint that a job starts from, and a check that its files are complete."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from titan_moe_lb.errors import JobError
from titan_moe_lb.terminal import run_folder

TOKEN_RANKS = "titan_moe_lb.token_ranks"
"""Name of a tensor in our checkpoints. Its size is the number of ranks of which each counts its own
tokens (torchtitan's ``ntokens_seen``). DCP's metadata contain the size, so nothing is loaded."""

_METADATA = ".metadata"
_FINISHED = (_METADATA, "model.safetensors.index.json")
"""torchtitan takes a step as complete if it has either file; it can load only one with the first."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Distributed checkpoint that a job loads."""

    path: Path

    step: int | None = None
    """Step of the job's own run; None for ``checkpoint.initial_load_path``."""

    @cached_property
    def metadata(self) -> Metadata:
        """Result of :func:`read_metadata`, read once; raises as it does."""
        return read_metadata(self.path)


def is_remote(config) -> bool:
    """Return True if a folder of a job's checkpoints is not on this machine's file systems."""
    checkpoint = config.checkpoint
    folders = (config.dump_folder, checkpoint.folder, checkpoint.initial_load_path or "")
    return any(run_folder.is_remote(folder) for folder in folders)


def own_folder(config) -> Path:
    """Return the folder to which a job writes its checkpoints, one subfolder per step."""
    return Path(config.dump_folder, config.checkpoint.folder)


def steps_in(folder: Path) -> dict[int, Path]:
    """Return the steps that a run has begun to save and their folders, ascending."""
    found = {
        int(match[1]): path
        for path in folder.glob("step-*")
        if (match := re.fullmatch(r"step-(\d+)", path.name))
    }
    return dict(sorted(found.items()))


def is_finished(path: Path) -> bool:
    """Return True if torchtitan considers the save of a step complete."""
    return any((path / name).is_file() for name in _FINISHED)


def start_of(config) -> Checkpoint | None:
    """Find the distributed checkpoint that a job loads, as torchtitan 0.3.0 chooses it.

    The choice is ``checkpoint.load_step``, else the job's latest complete step, else
    ``checkpoint.initial_load_path``. If a run has several steps and none is complete, torchtitan
    would silently begin again. This function then returns the latest step, which later fails
    :func:`damage`.

    Returns:
        None for a start from random or Hugging Face weights, and for a run that was killed in its
        first save. None for remote folders too, which are not read.
    """
    checkpoint = config.checkpoint
    if not checkpoint.enable or checkpoint.create_seed_checkpoint or is_remote(config):
        return None
    folder = own_folder(config)
    if checkpoint.load_step != -1:
        path = folder / f"step-{checkpoint.load_step}"
        return Checkpoint(path=path, step=checkpoint.load_step)
    steps = steps_in(folder)
    finished = {step: path for step, path in steps.items() if is_finished(path)}
    if not finished and checkpoint.initial_load_in_hf:
        return None
    if not finished and checkpoint.initial_load_path:
        return Checkpoint(path=Path(checkpoint.initial_load_path), step=None)
    if not finished and len(steps) == 1:
        return None
    latest = max(finished or steps, default=None)
    return None if latest is None else Checkpoint(path=steps[latest], step=latest)


def is_model_only(config, start: Checkpoint) -> bool:
    """Return True if a job loads only the weights of a checkpoint."""
    if start.step is None:
        return config.checkpoint.initial_load_model_only
    return start.step == 0


def left_out(config, start: Checkpoint | None) -> list[int]:
    """List the steps of a run that are newer than its start and incomplete."""
    if is_remote(config) or not config.checkpoint.enable or config.checkpoint.load_step != -1:
        return []
    begun = (start.step if start else None) or 0
    return [
        step
        for step, path in steps_in(own_folder(config)).items()
        if step > begun and not is_finished(path)
    ]


def remedy(folder: Path, broken: Path) -> str:
    """Name the key to set if a checkpoint cannot be loaded."""
    for step, path in reversed(steps_in(folder).items()):
        if path != broken and damage(Checkpoint(path=path)) is None:
            return f"the last good step in {folder} is {step}: set checkpoint.load_step = {step}"
    return (
        f"no other step in {folder} is whole: name another checkpoint in "
        "checkpoint.initial_load_path, or begin again in another checkpoint.folder"
    )


def read_metadata(path: Path) -> Metadata:
    """Read names, shapes and files of the tensors in a checkpoint."""
    file = path / _METADATA
    if not file.is_file():
        raise JobError(
            f"{file} is missing (a save that was cut short, a copy that left it out, or Hugging "
            "Face weights)"
        )
    try:
        metadata = FileSystemReader(path).read_metadata()
    except Exception as error:  # noqa: BLE001  a cut pickle can fail in any way
        raise JobError(f"{file} cannot be read ({type(error).__name__}): it is cut") from None
    if not isinstance(metadata, Metadata):
        raise JobError(f"{file} is no metadata of a checkpoint: it is damaged")
    return metadata


def damage(checkpoint: Checkpoint) -> str | None:
    """Describe the first file of a checkpoint that is missing or cut; None if all are complete.

    :mod:`titan_moe_lb.checkpoints.loading` checks the contents of the files.
    """
    path, sizes = checkpoint.path, dict[str, int]()
    try:
        metadata = checkpoint.metadata
        torn = next((name for name in metadata.state_dict_metadata if _torn(metadata, name)), None)
        for stored in (metadata.storage_data or {}).values():
            end = stored.offset + stored.length
            sizes[stored.relative_path] = max(end, sizes.get(stored.relative_path, 0))
        files = sorted((path / name, size) for name, size in sizes.items())
    except JobError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001  a changed pickle can contain anything
        return f"{path / _METADATA} is damaged ({type(error).__name__})"
    if torn is not None:
        return f"{path / _METADATA} is damaged: it does not say where all of {torn} is"
    for file, size in files:
        if not file.is_file():
            return f"{file} is missing"
        if os.path.getsize(file) < size:
            return f"{file} is cut: it has {os.path.getsize(file):,} of {size:,} bytes"
    return None


def _torn(metadata: Metadata, name: str) -> bool:
    """Return True if parts of an entry are missing; torch would load the others without error."""
    entry, stored = metadata.state_dict_metadata[name], metadata.storage_data
    if not isinstance(entry, TensorStorageMetadata):
        return MetadataIndex(name) not in stored
    parts = [part for part in entry.chunks if math.prod(part.sizes)]
    inside = all(
        offset >= 0 and offset + length <= size
        for part in parts
        for offset, length, size in zip(part.offsets, part.sizes, entry.size, strict=True)
    )
    return (
        not inside
        or len({tuple(part.offsets) for part in parts}) < len(parts)
        or sum(math.prod(part.sizes) for part in parts) != math.prod(entry.size)
        or any(MetadataIndex(name, part.offsets) not in stored for part in parts)
    )
