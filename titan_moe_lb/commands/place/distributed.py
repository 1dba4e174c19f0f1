"""Distributed checkpoint (DCP): tensors in chunks, as the ranks of a run held them."""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
import pickle
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from titan_moe_lb.checkpoints.resume_point import Checkpoint, damage
from titan_moe_lb.commands.place.by_expert import Stored
from titan_moe_lb.commands.place.checkpoint_files import CheckpointFiles, Moves, copy_span, to_disk
from titan_moe_lb.errors import JobError
from titan_moe_lb.upstream.torch_internals import FakeTensorMode, file_view

_METADATA = ".metadata"


@dataclass(frozen=True, eq=False)
class _Part:
    """Chunk of a tensor, or object."""

    index: MetadataIndex
    info: Any
    """DCP's record of the file, offset and length."""
    size: tuple[int, ...]

    @property
    def offset(self) -> tuple[int, ...]:
        """Position of the chunk in the tensor; () for an object."""
        return tuple(self.index.offset or ())


class DistributedFiles(CheckpointFiles):
    """Distributed checkpoint whose copy has the same chunks in the same files.

    A write needs memory for twice the largest chunk of a moved tensor.
    """

    def __init__(self, folder: Path) -> None:
        """Read the metadata.

        Raises:
            JobError: a file is missing or cut off, or a chunk is compressed.
        """
        super().__init__(folder)
        checkpoint = Checkpoint(path=folder)
        if problem := damage(checkpoint):
            raise JobError(problem)
        self._metadata: Metadata = checkpoint.metadata
        stored = self._metadata.state_dict_metadata
        self.tensors = {
            name: Stored(tuple(kind.size), str(kind.properties.dtype))
            for name, kind in stored.items()
            if isinstance(kind, TensorStorageMetadata)
        }
        self.objects = frozenset(stored.keys() - self.tensors.keys())
        sizes = {
            (name, tuple(chunk.offsets)): tuple(chunk.sizes)
            for name, kind in stored.items()
            if isinstance(kind, TensorStorageMetadata)
            for chunk in kind.chunks
        }
        self._parts: dict[str, list[_Part]] = defaultdict(list)
        for index, info in self._metadata.storage_data.items():
            if info.transform_descriptors:
                raise JobError(
                    f"{folder} is compressed ({', '.join(info.transform_descriptors)}): save it "
                    "without extensions first"
                )
            size = sizes.get((index.fqn, tuple(index.offset or ())), ())
            self._parts[index.fqn].append(_Part(index, info, size))
        self.data_files = frozenset(
            {info.relative_path for info in self._metadata.storage_data.values()} | {_METADATA}
        )
        self._view = lru_cache(maxsize=256)(self._mapped_view)

    @property
    def num_bytes(self) -> int:
        """Size of all chunks and objects in bytes."""
        return sum(info.length for info in self._metadata.storage_data.values())

    def row(self, name: str, index: int) -> np.ndarray:
        """Assemble one row of a tensor from its chunks."""
        row = torch.empty(self.tensors[name].shape[1:], dtype=self._dtype(name))
        self._fill(row, name, index, (0,) * row.dim())
        return row.reshape(-1).view(torch.uint8).numpy()

    def whole(self, name: str) -> list[np.ndarray]:
        """Map the serialised chunks of a tensor, or an object."""
        parts = sorted(self._parts[name], key=lambda part: part.offset)
        return [self._map(part.info, 0, part.info.length) for part in parts]

    def write(self, folder: Path, moves: Moves, advance: Callable[[int], None]) -> None:
        """Write all files chunk by chunk, then the metadata with new offsets and lengths."""
        written = {}
        parts = [part for parts in self._parts.values() for part in parts]
        parts.sort(key=lambda part: (part.info.relative_path, part.info.offset))
        for path, of_file in itertools.groupby(parts, lambda part: part.info.relative_path):
            with open(self.folder / path, "rb") as source, open(folder / path, "xb") as target:
                for part in of_file:
                    begin, info, name = target.tell(), part.info, part.index.fqn
                    other, order = moves.get(name, (name, None))
                    if order is None or not math.prod(part.size):
                        copy_span(source, info.offset, info.length, target, advance)
                    else:
                        target.write(self._moved(other, order, part).getbuffer())
                        advance(info.length)
                    length = target.tell() - begin
                    written[part.index] = dataclasses.replace(info, offset=begin, length=length)
                to_disk(target)
        metadata = dataclasses.replace(self._metadata, storage_data=written)
        if metadata.storage_meta is not None:  # load_id belongs to one load
            metadata.storage_meta = dataclasses.replace(metadata.storage_meta, load_id=None)
        with open(folder / _METADATA, "xb") as target:
            pickle.dump(metadata, target)
            to_disk(target)

    def _dtype(self, name: str) -> torch.dtype:
        return getattr(torch, self.tensors[name].dtype.removeprefix("torch."))

    def _moved(self, name: str, order: np.ndarray, part: _Part) -> io.BytesIO:
        """Assemble a chunk of the new checkpoint, and serialise it as DCP does."""
        chunk = torch.empty(part.size, dtype=self._dtype(name))
        first, *begin = part.offset
        for row, expert in zip(chunk, order[first:], strict=False):
            self._fill(row, name, int(expert), begin)
        stream = io.BytesIO()
        torch.save(chunk, stream)
        return stream

    def _fill(self, box: torch.Tensor, name: str, index: int, begin: Sequence[int]) -> None:
        """Copy a part of one row of a tensor from all chunks that overlap it.

        ``begin`` is the position of the box in the axes after the first.
        """
        found = 0
        for part in self._parts[name]:
            first, *offset = part.offset
            rows, *size = part.size
            if not first <= index < first + rows:
                continue
            low = np.maximum(begin, offset)
            high = np.minimum(np.add(begin, box.shape), np.add(offset, size))
            if (low >= high).any():
                continue
            inside = box[_slices(low, high, begin)]
            inside.copy_(self._view(part)[index - first][_slices(low, high, offset)])
            found += inside.numel()
        if found != box.numel():
            raise JobError(f"{self.folder}: the chunks of {name} are not the whole tensor")

    def _mapped_view(self, part: _Part) -> torch.Tensor:
        """Map a chunk as a tensor, with the strides and the offset that torch.save stored."""
        info = part.info
        with open(self.folder / info.relative_path, "rb") as file, FakeTensorMode():
            stream: Any = file_view(file, info.offset, info.length)
            outline = torch.load(stream, map_location="cpu", weights_only=True)
        storage = outline.untyped_storage()
        span = self._map(info, storage._checkpoint_offset, storage.nbytes())
        numbers = torch.frombuffer(span, dtype=outline.dtype)
        return numbers.as_strided(outline.shape, outline.stride(), outline.storage_offset())

    def _map(self, info: Any, begin: int, length: int) -> np.ndarray:
        # Copy-on-write, although nothing writes: torch warns about read-only arrays.
        file = self.folder / info.relative_path
        return np.memmap(file, mode="c", offset=info.offset + begin, shape=length)


def _slices(low: np.ndarray, high: np.ndarray, origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(b - o, e - o) for b, e, o in zip(low, high, origin, strict=True))
