"""Reader of a file of Arrow record batches that skips damaged batches."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from titan_moe_lb.errors import JobError
from titan_moe_lb.traces.checksum import KEY, is_intact

# Exceptions of pyarrow on bytes that are not a whole message; EOFError at the end of the file.
_BROKEN = (pa.ArrowException, OSError, EOFError, ValueError)
_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"
_BLOCK = 1 << 24
"""Bytes to search at a time for the start of a message."""


class BatchReader:
    """Reader of the whole batches of a step file, in order.

    Each read continues after the last batch of the read before.

    Attributes:
        schema: schema of every batch.
        count: number of batches of the last read.
        gaps: damaged stretches of the last read that whole batches follow. Each has the number
            of batches before it and its length in bytes.
        rest: bytes at the end of the file that are no whole batch: cut off, or not yet written.
    """

    def __init__(self, path: Path) -> None:
        """Map the file and read its schema.

        Raises:
            JobError: the file is missing, empty, damaged in its schema, or no Arrow stream.
        """
        self._path = path
        self.count = 0
        self.gaps: list[tuple[int, int]] = []
        self.rest = 0
        self._source = _open(path)
        if self._source.size() == 0:
            raise JobError(f"{path} is empty: the run has written no step")
        try:
            self.schema = pa.ipc.read_schema(self._source)
            self.schema.names  # noqa: B018  (pyarrow decodes them at the first access)
        except _BROKEN as error:
            raise JobError(
                f"{path} is not a trace of titan_moe_lb, or was cut off before its first "
                "step: name the folder of a run"
            ) from error
        self._position = self._source.tell()
        self._has_checksums = KEY in (self.schema.metadata or {})
        if self._has_checksums and not is_intact(self._bytes(0, self._position)):
            raise JobError(f"{path} is damaged at its beginning: use another run")

    def read(
        self,
        fits: Callable[[pa.RecordBatch], bool] = lambda batch: True,
        columns: Sequence[str] | None = None,
    ) -> Iterator[pa.RecordBatch]:
        """Read the batches since the last read. The iterator decodes one batch at a time.

        Args:
            fits: returns True if a batch can belong to this file; called only for a file
                without checksums.
            columns: columns to decode, of a file with checksums; default: all.
        """
        if self._source.size() != self._path.stat().st_size:
            self._source = _open(self._path)
        messages: list[memoryview] = []
        self.gaps = []
        while self._position < self._source.size():
            message = self._message(self._position, fits)
            if message is not None:
                messages.append(message)
                self._position += len(message)
                continue
            later = (at for at in self._starts() if self._message(at, fits) is not None)
            start = next(later, None)
            if start is None:
                break
            self.gaps.append((len(messages), start - self._position))
            self._position = start
        rest = self._bytes(self._position, self._source.size())
        # Other writers of Arrow end a stream with a marker.
        self.rest = 0 if bytes(rest[:9]) == _END else len(rest)
        self.count = len(messages)
        if not self._has_checksums:
            return (
                pa.ipc.read_record_batch(pa.py_buffer(message), self.schema) for message in messages
            )
        # The buffers are small: threads would cost more than they save.
        names = self.schema.names if columns is None else columns
        options = pa.ipc.IpcReadOptions(
            use_threads=False, included_fields=[self.schema.names.index(name) for name in names]
        )
        content = b"".join([self.schema.serialize(), *messages])
        return iter(pa.ipc.open_stream(content, options=options))

    def _message(self, position: int, fits: Callable[[pa.RecordBatch], bool]) -> memoryview | None:
        """Return the message at a position; None if it is damaged or cut off."""
        try:
            self._source.seek(position)
            message = pa.ipc.read_message(self._source)
            content = self._bytes(position, self._source.tell())
            if self._has_checksums:
                return content if is_intact(content) else None
            batch = pa.ipc.read_record_batch(message, self.schema)
            batch.validate(full=True)
            return content if fits(batch) else None
        except _BROKEN:
            return None

    def _bytes(self, start: int, stop: int) -> memoryview:
        self._source.seek(start)
        return memoryview(self._source.read_buffer(stop - start))

    def _starts(self) -> Iterator[int]:
        """Find the positions after a damaged message where another one may begin.

        An Arrow message begins at a multiple of 8, with 0xFFFFFFFF and the length of its metadata.
        """
        first = self._position + 8
        for block in range(first + -first % 8, self._source.size(), _BLOCK):
            content = self._bytes(block, min(block + _BLOCK, self._source.size()))
            words = np.frombuffer(content, dtype="<u4", count=len(content) // 8 * 2).reshape(-1, 2)
            marker, length = words[:, 0], words[:, 1]
            may_begin = (marker == 0xFFFFFFFF) & (length > 0) & (length % 8 == 0)
            may_begin &= length < self._source.size() - block
            yield from (block + 8 * np.flatnonzero(may_begin)).tolist()


def _open(path: Path) -> pa.NativeFile:
    """Map the file, so that a damaged length fails at its end instead of allocating memory."""
    try:
        if path.stat().st_size == 0:
            return pa.BufferReader(b"")
        return pa.memory_map(os.fsencode(path))  # pyarrow encodes a str as UTF-8 only
    except FileNotFoundError:
        raise JobError(f"{path}: there is no such file") from None
    except (OSError, ValueError) as error:
        raise JobError(f"{path} cannot be read: {error}") from None
