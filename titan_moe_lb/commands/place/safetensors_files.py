"""Hugging Face checkpoint: safetensors files, each with a header and then the tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from titan_moe_lb.commands.place.by_expert import Stored
from titan_moe_lb.commands.place.checkpoint_files import CheckpointFiles, Moves, copy_span, to_disk
from titan_moe_lb.errors import JobError

_INDEX = "model.safetensors.index.json"


class SafetensorsFiles(CheckpointFiles):
    """Hugging Face checkpoint whose copy has equal headers: only the bytes of tensors move.

    No type is converted, and quantized tensors move with their scales. A write needs 16 MiB of
    memory.
    """

    def __init__(self, folder: Path) -> None:
        """Read the headers.

        Raises:
            JobError: a file is missing, cut off, or no safetensors file, or an optimizer's state
                lies beside them.
        """
        super().__init__(folder)
        if states := sorted(path.name for path in folder.glob("optimizer*")):
            raise JobError(
                f"{folder} has the state of an optimizer, {states[0]}, whose experts would keep their "
                "order: place a copy of the folder without it"
            )
        self.tensors = {}
        self._where: dict[str, tuple[Path, int, int]] = {}
        self._begins: dict[Path, int] = {}
        files = sorted(folder.glob("*.safetensors"))
        self.data_files = frozenset(file.name for file in files)
        index = folder / _INDEX
        if index.is_file():
            for name in sorted(set(json.loads(index.read_text())["weight_map"].values())):
                if name not in self.data_files:
                    raise JobError(f"{folder / name} is missing: {index.name} names it")
        for file in files:
            self._enter(file)

    def _enter(self, file: Path) -> None:
        """Read the header of a file, and add its tensors."""
        size = file.stat().st_size
        try:
            with open(file, "rb") as opened:
                length = int.from_bytes(opened.read(8), "little")
                header: dict[str, Any] = json.loads(opened.read(min(length, size)))
            header.pop("__metadata__", None)
            entries = {
                name: (Stored(tuple(one["shape"]), one["dtype"]), *one["data_offsets"])
                for name, one in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError):
            raise JobError(f"{file} is cut, or no safetensors file") from None
        self._begins[file] = begin = 8 + length
        whole = begin + max((end for _kind, _first, end in entries.values()), default=0)
        if size != whole:
            raise JobError(f"{file} is cut: it has {size:,} of {whole:,} bytes")
        for name, (kind, first, end) in entries.items():
            self.tensors[name] = kind
            self._where[name] = (file, begin + first, end - first)

    @property
    def num_bytes(self) -> int:
        """Size of all safetensors files in bytes."""
        return sum((self.folder / name).stat().st_size for name in self.data_files)

    def row(self, name: str, index: int) -> np.ndarray:
        """Map one row of a tensor."""
        (span,) = self.whole(name)
        size = len(span) // self.tensors[name].shape[0]
        return span[index * size : (index + 1) * size]

    def whole(self, name: str) -> list[np.ndarray]:
        """Map a tensor; no piece if it is empty."""
        file, begin, length = self._where[name]
        if not length:
            return []
        return [np.memmap(file, mode="r", offset=begin, shape=length)]

    def write(self, folder: Path, moves: Moves, advance: Callable[[int], None]) -> None:
        """Write all files with their headers unchanged, and each tensor from its source."""
        for file, begin in self._begins.items():
            names = [name for name, (there, *_span) in self._where.items() if there == file]
            with open(file, "rb") as source, open(folder / file.name, "xb") as target:
                copy_span(source, 0, begin, target, advance)
                for name in sorted(names, key=lambda name: self._where[name][1]):
                    other, order = moves.get(name, (name, None))
                    there, first, length = self._where[other]
                    rows = 1 if order is None else len(order)
                    with open(there, "rb") as data:
                        for row in np.arange(rows) if order is None else order:
                            size = length // rows
                            copy_span(data, first + int(row) * size, size, target, advance)
                to_disk(target)
