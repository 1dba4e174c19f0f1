"""Reader of distributed checkpoints that compares the checksums in them.

Upstream fact: ``torch.save`` writes a CRC-32 into every record of a checkpoint, but ``torch.load``
does not compare it. A run would train on a flipped bit. So each rank reads twice what it loads,
the second time from the page cache.
"""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from typing import Any

from torch.distributed.checkpoint import FileSystemReader

from titan_moe_lb.errors import JobError


class CheckedReader(FileSystemReader):
    """Reader of a distributed checkpoint that raises ``JobError`` at the first damaged record."""

    def _slice_file(self, file: Any, sinfo: Any) -> Any:
        found = super()._slice_file(file, sinfo)
        try:
            with zipfile.ZipFile(_SeekableFromEnd(found)) as archive:
                broken = archive.testzip()
        except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, ValueError) as error:
            broken = str(error)
        if broken is not None:
            raise JobError(
                f"{os.path.join(self.path, sinfo.relative_path)} is damaged: its bytes "
                f"{sinfo.offset:,} to {sinfo.offset + sinfo.length:,} are not what was saved"
            )
        found.seek(0)
        return found


class _SeekableFromEnd(io.RawIOBase):
    """Slice of a file that seeks from its own end; torch 2.14's seeks from the end of the file."""

    def __init__(self, view: Any) -> None:
        self._view = view
        self.read, self.tell = view.read, view.tell  # type: ignore[method-assign]

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.tell(), os.SEEK_END: self._view.len}[whence]
        if start + offset < 0:
            raise ValueError("before the beginning")
        self._view.seek(start + offset)
        return start + offset
