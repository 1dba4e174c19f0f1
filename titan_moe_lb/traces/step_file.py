"""File of record batches, by step, that survives crashes, full disks and resumed runs.

The file is an Arrow IPC stream without the end marker, which is optional in the format. It
contains a schema and then whole batches. Each batch is one write, so a killed process loses at
most the batch that it was writing, and a resumed run can append.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa

from titan_moe_lb.errors import JobError
from titan_moe_lb.traces.batch_reader import BatchReader
from titan_moe_lb.traces.checksum import METADATA, stamp

logger = logging.getLogger(__name__)


class StepFile:
    """Writer of batches with a column ``step``, which never decreases.

    An existing file stays as it is until the first write, of step S. If ``resume`` accepts the
    file, its batches before step S are kept. Later ones are dropped, because the resumed run
    repeats them. A file that cannot be continued is renamed.

    After an ``OSError`` (a full disk, a lost mount) the writer logs one warning and ignores further
    writes, so that training continues.
    """

    def __init__(
        self,
        path: Path,
        schema: pa.Schema,
        resume: Callable[[pa.Schema, int], pa.Schema],
        compression: str | None,
    ) -> None:
        """Prepare the writer, without touching the file.

        Args:
            path: the file; the first write makes its folder.
            schema: schema of a new file.
            resume: called with the schema of an existing file and the first step to write.
                Returns the schema of the continued file, or raises JobError to reject the file.
            compression: compression of the batches: "zstd", with checksums, or None, without
                checksums, so that a reader can map the file.
        """
        self.path = path
        self._new = path.with_name(path.name + ".new")
        self._schema = schema
        self._resume = resume
        self._options = pa.ipc.IpcWriteOptions(compression=compression)
        self._has_checksums = compression is not None
        self._sink = io.BytesIO()
        self._head_size = 0
        self._file: io.FileIO | None = None
        self._writer: pa.RecordBatchStreamWriter | None = None
        self._failed = False

    def write(self, step: int, batch: pa.RecordBatch) -> None:
        """Append one batch; the operating system has it when this returns."""
        if self._failed:
            return
        try:
            if self._file is None:
                self._open(step, batch)
            else:
                self._append(batch)
        except OSError as error:
            self._failed = True
            logger.warning(
                f"{self.path} cannot be written ({error.strerror or error}): training goes on, "
                f"its steps from {step} on are not recorded"
            )
            with contextlib.suppress(OSError):
                self.close()
                self._new.unlink()

    def close(self) -> None:
        """Close the file, which already contains every batch."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _open(self, first_step: int, batch: pa.RecordBatch) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        earlier = self._earlier(first_step) if self.path.exists() else ()
        # The old file is replaced only when the new one contains all earlier steps and one more.
        self._file = open(self._new, "wb", buffering=0)  # noqa: SIM115
        if self._has_checksums:
            self._schema = self._schema.with_metadata({**self._schema.metadata, **METADATA})
        self._head_size = self._schema.serialize().size
        self._writer = pa.ipc.new_stream(self._sink, self._schema, options=self._options)
        for one in earlier:
            self._append(one)
        self._append(batch)
        os.replace(self._new, self.path)

    def _earlier(self, first_step: int) -> Iterable[pa.RecordBatch]:
        """Read the batches before ``first_step`` from the existing file, and set the new schema.

        Rename the existing file and return no batches if it cannot be continued.
        """
        try:
            source = BatchReader(self.path)
            schema = self._resume(source.schema, first_step)
            batches = (batch for batch in source.read() if _step(batch) < first_step)
            first = next(batches, None)
            if first is None:
                raise JobError(f"it holds nothing before step {first_step}")
            self._schema = schema
            if broken := sum(size for _before, size in source.gaps) + source.rest:
                logger.warning(
                    f"{self.path} is continued without {broken} of its bytes, which are damaged or "
                    "no whole step: what they recorded is here if it is trained again"
                )
        except JobError as error:
            aside = _free_name(self.path)
            os.replace(self.path, aside)
            logger.warning(f"{self.path} is not continued ({error}): kept as {aside.name}")
            return ()
        return itertools.chain([first], batches)

    def _append(self, batch: pa.RecordBatch) -> None:
        assert self._writer is not None and self._file is not None
        metadata = METADATA if self._has_checksums else None
        self._writer.write_batch(_fit(batch, self._schema), custom_metadata=metadata)
        written = bytearray(self._sink.getvalue())
        self._sink.seek(0)
        self._sink.truncate()
        # The writer puts the schema before its first batch.
        parts = written[: self._head_size], written[self._head_size :]
        self._head_size = 0
        if self._has_checksums:
            for part in filter(None, parts):
                stamp(part)
        content = memoryview(b"".join(parts))
        while content:  # a full disk may accept a part before it fails
            content = content[self._file.write(content) :]


def _step(batch: pa.RecordBatch) -> int:
    step = batch.column("step")[0].as_py() if batch.num_rows else None
    return -1 if step is None else step


def _fit(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """Convert a batch to a schema with more columns, which become null."""
    names = batch.schema.names
    return pa.record_batch(
        [
            batch.column(field.name)
            if field.name in names
            else pa.nulls(batch.num_rows, field.type)
            for field in schema
        ],
        schema=schema,
    )


def _free_name(path: Path) -> Path:
    number = 1
    while (name := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    return name
