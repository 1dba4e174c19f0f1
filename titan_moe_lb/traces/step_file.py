"""File of record batches, by step, that survives crashes, full disks and resumed runs.

The file is an Arrow IPC stream: a schema, whole batches, and the format's own mark at the end of a
run. Each batch is one write, so a killed process loses at most the batch that it was writing. A
resumed run appends: it changes nothing before its first step.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from titan_moe_lb.errors import JobError
from titan_moe_lb.traces.batch_reader import END, RUN, BatchReader, step_of
from titan_moe_lb.traces.checksum import METADATA, stamp

logger = logging.getLogger(__name__)


class StepFile:
    """Writer of batches with a column ``step``, which never decreases.

    An existing file stays as it is until the first write, of step S. If ``resume`` accepts the
    file, it is cut off at step S, because the resumed run repeats the steps from there, and is
    appended to. A file that lacks a column or checksums is copied, step by step, to one that has
    them. A file that cannot be continued is renamed.

    After an ``OSError`` (a full disk, a lost mount, a file that another process writes) the writer
    logs one warning and ignores further writes, so that training continues.
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
        self._checksum = METADATA if compression is not None else {}
        self._metadata = self._checksum
        self._file: BinaryIO | None = None
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
        except (OSError, JobError) as error:
            self._failed = True
            reason = getattr(error, "strerror", None) or error
            logger.warning(
                f"{self.path} cannot be written ({reason}): training goes on, its steps from "
                f"{step} on are not recorded"
            )
            self.close()

    def close(self) -> None:
        """Mark the end of the file, which already contains every batch, and close it."""
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError), file:
                if not self._failed:
                    file.write(END)

    def _open(self, first_step: int, batch: pa.RecordBatch) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        source = None
        if self.path.exists():
            try:
                source = BatchReader(self.path)
                if self._continues(source, first_step):
                    self._append(batch)
                    return
            except JobError as error:
                with _locked(self.path):
                    aside = _free_name(self.path)
                    os.replace(self.path, aside)
                logger.warning(f"{self.path} is not continued ({error}): kept as {aside.name}")
                source = None
        # The old file is replaced only when the new one contains all earlier steps and one more.
        self._file = _locked(self._new)
        try:
            self._file.truncate()
            self._schema = self._schema.with_metadata({**self._schema.metadata, **self._checksum})
            self._put(self._schema.serialize().to_pybytes())
            if source is not None:
                self._copy(source, first_step)
            self._append(batch)
            os.replace(self._new, self.path)
        except OSError:
            self._new.unlink(missing_ok=True)
            raise

    def _continues(self, source: BatchReader, first_step: int) -> bool:
        """Cut the existing file off before a step, to append to it.

        Returns:
            False if it has to be copied, because it lacks a column, or has no checksums.

        Raises:
            JobError: it cannot be continued.
        """
        end = source.end_before(first_step)
        schema = self._resume(source.described(end), first_step)
        if end is None:
            raise JobError(f"it holds nothing before step {first_step}")
        self._warn_of(source.rest)
        # Readers map a file without checksums into memory, which must not become shorter then.
        as_before = schema == source.schema and source.has_checksums and bool(self._checksum)
        if as_before:
            source.close()  # before the lock, which this would release
        file = _locked(self.path)
        if not as_before:
            file.close()
            self._schema = schema
            return False
        self._file = file
        self._new.unlink(missing_ok=True)  # of a copy that was killed
        file.truncate(end)
        file.seek(end)
        self._schema = source.schema
        self._metadata = {**schema.metadata, **self._checksum}
        return True

    def _copy(self, source: BatchReader, first_step: int) -> None:
        """Copy the batches before a step to the new file."""
        batches = source.read()
        self._warn_of(sum(size for _before, size in source.gaps))
        for batch in batches:
            if step_of(batch) >= first_step:
                break
            if batch.num_rows:
                self._append(batch)

    def _warn_of(self, broken: int) -> None:
        if broken:
            logger.warning(
                f"{self.path} is continued without {broken} of its bytes, which are damaged or no "
                "whole step: what they recorded is here if it is trained again"
            )

    def _append(self, batch: pa.RecordBatch) -> None:
        assert self._file is not None
        start, sink = self._file.tell(), io.BytesIO()
        writer = pa.ipc.new_stream(sink, self._schema, options=self._options)
        writer.write_batch(_fit(batch, self._schema), custom_metadata=self._metadata or None)
        # The writer puts the schema before the batch.
        self._put(sink.getvalue()[self._schema.serialize().size :])
        if self._metadata.keys() - self._checksum.keys() - {RUN}:  # it has described a resumed run
            self._metadata = {RUN: b"%d" % start, **self._checksum}

    def _put(self, message: bytes) -> None:
        assert self._file is not None
        content = bytearray(message)
        if self._checksum:
            stamp(content)
        rest = memoryview(content)
        while rest:  # a full disk may accept a part before it fails
            rest = rest[self._file.write(rest) :]


def _locked(path: Path) -> BinaryIO:
    """Open a file to write it, which one process may do at a time.

    Raises:
        OSError: another process writes it, or it cannot be opened.
    """
    file = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)  # noqa: SIM115
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.close()
            message = "another run writes it: give each its own dump_folder"
            raise OSError(error.errno, message) from None
        # A file system without locks.
    return file


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
