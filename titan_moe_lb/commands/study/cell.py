"""One run of a study: its flags, its run folder and its outcome."""

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
"""Folder of all cells, in the folder of the study."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Run of a study, with one value of each axis."""

    labels: dict[str, str]
    """Name of the value, by title of the axis."""
    seed: int | None
    flags: list[str]
    """Flags of the job."""
    ranks: int

    @property
    def name(self) -> str:
        """Name of the folder, which is never hidden and never ``..``."""
        parts = [
            re.sub(r"[^A-Za-z0-9.+-]+", "_", text).strip("._") for text in self.labels.values()
        ]
        return "_".join(part or "_" for part in parts)


@dataclass(frozen=True, kw_only=True)
class Record(Cell):
    """Outcome of a cell, written at its end. A folder without a record was interrupted."""

    status: Literal["done", "diverged", "failed"]
    """``diverged`` if the loss is not a number; ``failed`` for every other error."""
    seconds: float
    error: str
    """Error in one line; empty without an error."""


class CellFolder:
    """Folder of a cell in the folder of its study."""

    def __init__(self, study_folder: Path, cell: Cell) -> None:
        self.cell = cell
        self.path = study_folder / CELLS / cell.name

    @property
    def log(self) -> Path:
        """File with the output of the cell."""
        return self.path / LOG

    def record(self) -> Record | None:
        """Read the outcome of the cell; None if it has not ended.

        Raises:
            JobError: the record is damaged, or another job was run in the folder.
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
                f"{self.path} contains a cell of another study. Only there: "
                f"{' '.join(theirs_only) or 'nothing'}. Only here: {' '.join(mine_only) or 'nothing'}; "
                "choose another folder with --output"
            )
        return record

    def clear(self) -> None:
        """Delete the folder and create it again.

        Raises:
            OSError: the folder cannot be written.
        """
        if self.path.exists():
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True)

    def write(self, record: Record) -> None:
        """Write the record atomically.

        Raises:
            JobError: the folder cannot be written.
        """
        partial = self.path / f".{RECORD}"
        try:
            partial.write_text(json.dumps(asdict(record), indent=1) + "\n")
            os.replace(partial, self.path / RECORD)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise self.unwritable(error) from None

    def unwritable(self, error: OSError) -> JobError:
        """Convert an error of the file system, such as a full disk, to a :class:`JobError`."""
        return JobError(
            f"{self.path} cannot be written ({error.strerror}): what has ended is kept; make "
            "room and start the study again"
        )
