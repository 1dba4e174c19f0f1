"""Base class of both kinds of checkpoint: write a copy with moved tensors, and read it back."""

from __future__ import annotations

import hashlib
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from titan_moe_lb.checkpoints import placement_file
from titan_moe_lb.commands.place.by_expert import Stored
from titan_moe_lb.errors import JobError

Moves = dict[str, tuple[str, np.ndarray | None]]
"""Name of each tensor that moves to the tensor it comes from and the order of that tensor's rows.

The source is a tensor of equal shape and type. The order is None if the rows stay in order. A
tensor without an entry is copied.
"""

_COPIED_AT_ONCE = 16 << 20


class CheckpointFiles(ABC):
    """Checkpoint in a folder.

    Its files are memory-mapped, so only the parts that are read take memory.

    Attributes:
        tensors: tensors by name.
        objects: names of other stored objects.
        data_files: names of the files with tensors and objects, relative to the folder.
    """

    tensors: dict[str, Stored]
    objects: frozenset[str] = frozenset()
    data_files: frozenset[str]

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Size of the stored data in bytes."""

    @abstractmethod
    def row(self, name: str, index: int) -> memoryview | np.ndarray:
        """Read the bytes of one row of a tensor."""

    @abstractmethod
    def whole(self, name: str) -> list[memoryview | np.ndarray]:
        """Read the stored bytes of a tensor or an object, in pieces."""

    @abstractmethod
    def write(self, folder: Path, moves: Moves, advance: Callable[[int], None]) -> None:
        """Write the checkpoint with moved tensors to an empty folder.

        ``advance`` gets the number of bytes after each write.
        """

    def copy(self, folder: Path, moves: Moves, advance: Callable[[int], None]) -> None:
        """Write a copy with moved tensors and all other files, and compare it with this one.

        ``advance`` gets numbers of bytes; their sum is three times the size of the checkpoint.

        Raises:
            JobError: the copy differs.
        """
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.copytree(path, folder / path.name)
            elif path.name not in {*self.data_files, placement_file.FILE_NAME}:
                shutil.copy2(path, folder)
        self.write(folder, moves, advance)
        copied = type(self)(folder)
        same = copied.tensors == self.tensors and copied.objects == self.objects
        for name in (*self.tensors, *self.objects):
            source, order = moves.get(name, (name, None))
            pairs: Iterable[tuple[Iterable, Iterable]] = (
                [(copied.whole(name), self.whole(source))]
                if order is None
                else (
                    ([copied.row(name, place)], [self.row(source, expert)])
                    for place, expert in enumerate(map(int, order))
                )
            )
            digests = ([_digest(pieces, advance) for pieces in pair] for pair in pairs)
            same = same and all(mine == theirs for mine, theirs in digests)
            if not same:
                raise JobError(
                    f"{name} reads back otherwise than it was written: the disk or the memory of "
                    "this machine is faulty; nothing of it is left"
                )


def _digest(pieces: Iterable, advance: Callable[[int], None]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for piece in pieces:
        digest.update(piece)
        advance(len(piece))
    return digest.digest()


def copy_span(
    source: BinaryIO, begin: int, length: int, target: BinaryIO, advance: Callable[[int], None]
) -> None:
    """Copy bytes between files, at most 16 MiB at a time.

    Raises:
        OSError: the source ends early.
    """
    source.seek(begin)
    while length:
        piece = source.read(min(length, _COPIED_AT_ONCE))
        if not piece:
            raise OSError(f"{source.name} ended while it was read")
        target.write(piece)
        length -= len(piece)
        advance(len(piece))


def to_disk(file: BinaryIO) -> None:
    """Flush a file to the disk."""
    file.flush()
    os.fsync(file.fileno())
