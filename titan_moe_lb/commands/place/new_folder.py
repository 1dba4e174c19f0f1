"""New folder that is created atomically."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from titan_moe_lb.checkpoints.resume_point import steps_in
from titan_moe_lb.errors import JobError


def check(new: Path, num_bytes: int) -> None:
    """Check that a folder of that size can be made, before the work starts.

    Raises:
        JobError: the path exists, its parent is not writable or contains steps of a run, or the
            disk has too little space.
    """
    if os.path.lexists(new):
        raise JobError(f"{new} exists: name a new folder with --output")
    if not new.parent.is_dir() or not os.access(new.parent, os.W_OK):
        raise JobError(f"{new} cannot be made: {new.parent} is no folder that can be written to")
    if steps_in(new.parent):
        raise JobError(
            f"{new} would be a step among those of a run, whose other steps and trace number the "
            "experts otherwise: name a folder of its own"
        )
    free = shutil.disk_usage(new.parent).free
    if free < num_bytes:
        raise JobError(f"{new} needs {num_bytes:,} bytes, and {free:,} are free in {new.parent}")


@contextlib.contextmanager
def whole(new: Path) -> Iterator[Path]:
    """Make a hidden folder beside a new one, and rename it when its content is on the disk.

    Yields:
        Path of the hidden folder. It is removed after any exception.

    Raises:
        JobError: the system cannot write, for example because the disk is full.
    """
    partial = new.with_name(f".{new.name}.{os.getpid()}")
    try:
        partial.mkdir()
        yield partial
        for folder, *_ in os.walk(partial):
            _folder_to_disk(Path(folder))
        os.rename(partial, new)
        _folder_to_disk(new.parent)
    except OSError as error:
        raise JobError(
            f"{new} could not be written ({error.strerror or error}): nothing of it is left"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _folder_to_disk(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
