"""One run of a study: its folder, which is that of any run, and what became of it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from titan_moe_lb.errors import JobError

RECORD = "cell.json"
LOG = "log"
CELLS = "cells"
"""Folder of the cells in that of their study."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One value of each axis."""

    labels: dict[str, str]
    """Name of its value, by axis."""
    seed: int | None
    flags: list[str]
    """Flags of its job."""
    ranks: int

    @property
    def name(self) -> str:
        """Name of its folder, which is not hidden and is never ``..``."""
        parts = [
            re.sub(r"[^A-Za-z0-9.+-]+", "_", text).strip("._") for text in self.labels.values()
        ]
        return "_".join(part or "_" for part in parts)


@dataclass(frozen=True, kw_only=True)
class Record(Cell):
    """Outcome of a cell, written when it has ended: a folder without one was cut short."""

    status: Literal["done", "diverged", "failed"]
    """``diverged``: it ran to its end, and its loss is not a number."""
    seconds: float
    error: str
    """Why it failed, in a line; empty where it did not."""


class CellFolder:
    """The folder of a cell in the folder of its study."""

    def __init__(self, study_folder: Path, cell: Cell) -> None:
        self.cell = cell
        self.path = study_folder / CELLS / cell.name

    @property
    def log(self) -> Path:
        """Output of the cell."""
        return self.path / LOG

    def record(self) -> Record | None:
        """Read the outcome of the cell; None where it has not ended.

        Raises:
            JobError: another job was run there.
        """
        path = self.path / RECORD
        if not path.is_file():
            return None
        try:
            record = Record(**json.loads(path.read_text()))
        except (ValueError, TypeError):
            raise JobError(
                f"{path} is damaged: delete {self.path}, the cell is run again"
            ) from None
        mine, theirs = [self.cell.ranks, *self.cell.flags], [record.ranks, *record.flags]
        if mine != theirs:
            mine_only = [str(word) for word in mine if word not in theirs]
            theirs_only = [str(word) for word in theirs if word not in mine]
            raise JobError(
                f"{self.path} is of another study: it was run with {' '.join(theirs_only) or 'less'}"
                f", this one has {' '.join(mine_only) or 'less'}; name another folder with --output"
            )
        return record

    def clear(self) -> None:
        """Make the folder anew. Raises ``OSError``."""
        if self.path.exists():
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True)

    def write(self, record: Record) -> None:
        """Write the record whole or not at all."""
        partial = self.path / f".{RECORD}"
        try:
            partial.write_text(json.dumps(asdict(record), indent=1) + "\n")
            os.replace(partial, self.path / RECORD)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise self.unwritable(error) from None

    def unwritable(self, error: OSError) -> JobError:
        """Error for a full disk."""
        return JobError(
            f"{self.path} cannot be written ({error.strerror}): what has ended is kept; make "
            "room and start the study again"
        )
