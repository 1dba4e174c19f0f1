"""Base class of both kinds of checkpoint: tensors to read by row and to write in place."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from titan_moe_lb.commands.place.by_expert import Stored

Moves = dict[str, tuple[str, np.ndarray | None]]
"""Source of each tensor: the rows of a tensor of its shape and type, in an order; None for as they
are. A tensor without an entry stays."""

_COPIED_AT_ONCE = 16 << 20


class CheckpointFiles(ABC):
    """A checkpoint in a folder. It maps its files, so that memory holds only what a caller
    reads.

    Attributes:
        tensors: by name.
        objects: names of what is stored besides.
        data_files: what holds them; names relative to the folder.
    """

    tensors: dict[str, Stored]
    objects: frozenset[str] = frozenset()
    data_files: frozenset[str]

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Bytes of all data files."""

    @abstractmethod
    def row(self, name: str, index: int) -> memoryview | np.ndarray:
        """The bytes of one expert of a tensor whose first axis is the expert."""

    @abstractmethod
    def whole(self, name: str) -> list[memoryview | np.ndarray]:
        """The bytes of a tensor or an object as they are stored, in pieces."""

    @abstractmethod
    def write(self, folder: Path, moves: Moves, advance: Callable[[int], None]) -> None:
        """Write the checkpoint with its tensors moved, into an empty folder.

        Args:
            advance: called with every number of written bytes.
        """


def copy_span(
    source: BinaryIO, begin: int, length: int, target: BinaryIO, advance: Callable[[int], None]
) -> None:
    source.seek(begin)
    while length:
        piece = source.read(min(length, _COPIED_AT_ONCE))
        if not piece:
            raise OSError(f"{source.name} ended while it was read")
        target.write(piece)
        length -= len(piece)
        advance(len(piece))


def to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
