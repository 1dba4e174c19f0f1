"""Reader of a file of Arrow record batches, in order, from its end, or at any step.

The steps of a file never decrease, and every message can be recognised without the ones before it.
So a step is found by bisection of the bytes: there is no index that could disagree with its file.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from titan_moe_lb.errors import JobError
from titan_moe_lb.traces.checksum import KEY, is_intact

END = b"\xff\xff\xff\xff\x00\x00\x00\x00"
"""End of an Arrow stream: the run has ended. It is optional in the format."""
RUN = b"run"
"""Metadata key of a batch: position of the first batch of its run, which describes the run."""

# Exceptions of pyarrow on bytes that are not a whole message; EOFError at the end of the file.
_BROKEN = (pa.ArrowException, OSError, EOFError, ValueError)
_SMALLEST_BLOCK, _LARGEST_BLOCK = 1 << 16, 1 << 24
"""Bytes to search at a time for the start of a message."""
_GROUP = 32
"""Batches to decode at a time."""


class BatchReader:
    """Reader of the whole batches of a step file.

    Each read continues after the last batch of the read before.

    Attributes:
        schema: schema of every batch.
        fits: returns True if a batch can belong to this file; called only for a file without
            checksums.
        count: number of batches of the last read.
        is_sample: True if the last read skipped batches.
        gaps: damaged stretches of the last read that whole batches follow. Each has the number
            of batches before it and its length in bytes.
        rest: bytes at the end of the file that are no whole batch: cut off, or not yet written.
        ended: True if the file has the mark of its end.
    """

    def __init__(self, path: Path) -> None:
        """Open the file and read its schema.

        Raises:
            JobError: the file is missing, empty, damaged in its schema, or no Arrow stream.
        """
        self._path = path
        self.fits: Callable[[pa.RecordBatch], bool] = lambda batch: True
        self.count = 0
        self.is_sample = False
        self.gaps: list[tuple[int, int]] = []
        self.rest = 0
        self.ended = False
        self._seal = (0, b"")
        # A resumed run shortens the file, which a mapped one does not survive.
        self._opened: Callable[[bytes], pa.NativeFile] = pa.OSFile
        self._source = self._open()
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
        self._first = self._position = self._source.tell()
        self.has_checksums = KEY in (self.schema.metadata or {})
        if self.has_checksums and not is_intact(self._bytes(0, self._position)):
            raise JobError(f"{path} is damaged at its beginning: use another run")
        if not self.has_checksums:  # its batches may be large, and need not be copied
            self._opened = pa.memory_map
            self._source = self._open()

    def read(
        self, columns: Sequence[str] | None = None, most: int | None = None
    ) -> Iterator[pa.RecordBatch]:
        """Read the batches since the last read. The iterator decodes a few at a time.

        Args:
            columns: columns to decode, of a file with checksums; default: all.
            most: of about this many batches or more, read evenly spread ones and the last one;
                default: all.
        """
        self._refresh()
        self.gaps = []
        places = None if most is None else self._sample(most)
        self.is_sample = places is not None
        if places is None:
            places = self._all()
        self.count = len(places)
        if places:
            start, stop = places[-1]
            self._seal = (start, bytes(self._bytes(start, min(stop, start + 4096))))
        self._look_behind(self._position)
        return self._decoded(places, columns)

    def skip_to_last(self, count: int) -> None:
        """Let the next read begin with the last ``count`` batches."""
        for start, _stop in itertools.islice(self._from_end(), count):
            self._position = start

    def is_shortened(self) -> bool:
        """Return True if the last batch that was read is no longer there: a run was resumed."""
        start, content = self._seal
        self._refresh()
        return bytes(self._bytes(start, start + len(content))) != content

    def last_step(self) -> int | None:
        """Return the step of the last whole batch; None if there is none."""
        last = next(self._from_end(), None)
        return None if last is None else self._step(last)

    def end_before(self, step: int) -> int | None:
        """Return the end of the last whole batch before a step; None if there is none.

        It sets ``rest`` and ``ended``.
        """
        last = next(self._from_end(), None)
        low, high = self._first, self._first if last is None else last[1]
        self._look_behind(high)
        # The steps of all batches that begin before low are smaller than the step, and those of
        # all batches that begin at high or later are not.
        while low < high:
            middle = (low + high) // 2
            place = next(self._from(middle), None)
            if place is not None and self._step(place) < step:
                low = place[1]
            else:
                high = middle
        return None if low == self._first else low

    def described(self, end: int | None = None) -> pa.Schema:
        """Return the schema with the description of the run that wrote the last whole batch.

        The schema of the file describes the first run. A resumed run describes itself in the
        metadata of its first batch, and names the position of that batch in its later ones.

        Args:
            end: end of the batches to look at; default: that of the file.
        """
        last = next((place for place in self._from_end() if end is None or place[1] <= end), None)
        try:
            found = {} if last is None else self._metadata(*last)
            if RUN in found:
                start = int(found[RUN])
                stop = self._end_of(start)
                found = {} if stop is None else self._metadata(start, stop)
        except _BROKEN:  # without checksums
            return self.schema
        found.pop(KEY, None)
        return self.schema.with_metadata(found) if found else self.schema

    def close(self) -> None:
        """Close the file."""
        self._source.close()

    def _look_behind(self, end: int) -> None:
        """Set what is behind the last whole batch."""
        rest = self._source.size() - end
        self.ended = bytes(self._bytes(end, end + len(END))) == END and rest == len(END)
        self.rest = 0 if self.ended else rest

    def _sample(self, most: int) -> list[tuple[int, int]] | None:
        """Find whole messages at evenly spread positions; None if there are hardly more."""
        last = next(self._from_end(), None)
        if last is None or last[1] <= self._position + most * (last[1] - last[0]):
            return None
        starts = np.linspace(self._position, last[0], most).astype(int).tolist()
        self._position = last[1]
        return list(dict.fromkeys(next(self._from(start), last) for start in starts))

    def _all(self) -> list[tuple[int, int]]:
        """Find all whole messages since the last read, and the gaps between them."""
        places: list[tuple[int, int]] = []
        while self._position < self._source.size():
            end = self._end_of(self._position)
            if end is None:
                place = next(self._from(self._position + 8), None)
                if place is None:
                    break
                self.gaps.append((len(places), place[0] - self._position))
                self._position, end = place
            places.append((self._position, end))
            self._position = end
        return places

    def _end_of(self, position: int) -> int | None:
        """Return the end of the message at a position; None if it is damaged or cut off."""
        try:
            self._source.seek(position)
            message = pa.ipc.read_message(self._source)
            end = self._source.tell()
            if self.has_checksums:
                return end if is_intact(self._bytes(position, end)) else None
            batch = pa.ipc.read_record_batch(message, self.schema)
            batch.validate(full=True)
            return end if self.fits(batch) else None
        except _BROKEN:
            return None

    def _from(self, position: int) -> Iterator[tuple[int, int]]:
        """Find start and end of the whole messages that begin at a position or later."""
        start, size = position + -position % 8, _SMALLEST_BLOCK
        while start < self._source.size():
            yield from self._whole(self._starts(start, start + size))
            start, size = start + size, min(4 * size, _LARGEST_BLOCK)

    def _from_end(self) -> Iterator[tuple[int, int]]:
        """Find start and end of the whole messages, from the last to the first."""
        stop, size = self._source.size() + -self._source.size() % 8, _SMALLEST_BLOCK
        while stop > self._first:
            start = max(self._first, stop - size)
            yield from self._whole(reversed(self._starts(start, stop)))
            stop, size = start, min(4 * size, _LARGEST_BLOCK)

    def _whole(self, starts: Iterator[int] | list[int]) -> Iterator[tuple[int, int]]:
        for start in starts:
            if (end := self._end_of(start)) is not None:
                yield start, end

    def _starts(self, start: int, stop: int) -> list[int]:
        """Find the positions between two multiples of 8 where a message may begin.

        An Arrow message begins at a multiple of 8, with 0xFFFFFFFF and the length of its metadata.
        """
        content = self._bytes(start, min(stop, self._source.size()))
        words = np.frombuffer(content, dtype="<u4", count=len(content) // 8 * 2).reshape(-1, 2)
        marker, length = words[:, 0], words[:, 1]
        may_begin = (marker == 0xFFFFFFFF) & (length > 0) & (length % 8 == 0)
        may_begin &= length < self._source.size() - start
        return (start + 8 * np.flatnonzero(may_begin)).tolist()

    def _step(self, place: tuple[int, int]) -> int:
        (batch,) = self._decoded([place], ["step"])
        return step_of(batch)

    def _metadata(self, start: int, stop: int) -> dict[bytes, bytes]:
        content = b"".join([self.schema.serialize(), self._bytes(start, stop)])
        options = pa.ipc.IpcReadOptions(use_threads=False, included_fields=[0])
        found = pa.ipc.open_stream(content, options=options).read_next_batch_with_custom_metadata()
        return dict(found.custom_metadata or {})

    def _decoded(
        self, places: list[tuple[int, int]], columns: Sequence[str] | None
    ) -> Iterator[pa.RecordBatch]:
        try:
            if not self.has_checksums:
                for place in places:
                    yield pa.ipc.read_record_batch(pa.py_buffer(self._bytes(*place)), self.schema)
                return
            # The buffers are small: threads would cost more than they save.
            names = self.schema.names if columns is None else columns
            options = pa.ipc.IpcReadOptions(
                use_threads=False, included_fields=[self.schema.names.index(name) for name in names]
            )
            head = self.schema.serialize()
            for first in range(0, len(places), _GROUP):
                group = (self._bytes(*place) for place in places[first : first + _GROUP])
                yield from pa.ipc.open_stream(b"".join([head, *group]), options=options)
        except _BROKEN as error:
            raise JobError(f"{self._path} was changed while it was read: read it again") from error

    def _bytes(self, start: int, stop: int) -> memoryview:
        self._source.seek(start)
        return memoryview(self._source.read_buffer(max(0, stop - start)))

    def _refresh(self) -> None:
        if self._source.size() != self._path.stat().st_size:
            self._source = self._open()

    def _open(self) -> pa.NativeFile:
        path = self._path
        try:
            if path.stat().st_size == 0:
                return pa.BufferReader(b"")
            return self._opened(os.fsencode(path))  # pyarrow encodes a str as UTF-8 only
        except FileNotFoundError:
            raise JobError(f"{path}: there is no such file") from None
        except (OSError, ValueError) as error:
            raise JobError(f"{path} cannot be read: {error}") from None


def step_of(batch: pa.RecordBatch) -> int:
    """Return the step of a batch; -1 if it has none."""
    step = batch["step"][0].as_py() if batch.num_rows else None
    return -1 if step is None else step
