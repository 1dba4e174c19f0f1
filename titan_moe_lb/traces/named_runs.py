"""Runs that a command line names: runs, folders of runs, and glob patterns."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from titan_moe_lb.errors import JobError
from titan_moe_lb.traces.trace import FILE_NAME, MOST_BYTES, Trace, read_trace, trace_file

_NEXT = "name the folder of a run, a folder of runs, or a quoted pattern"


@dataclass(frozen=True)
class NamedRuns:
    """Traces of the named runs, each once."""

    files: list[Path]
    is_single: bool
    """True if one run was named by itself, not by a folder of runs or a pattern."""
    repeated: list[str]
    """A sentence for each run that was named more than once."""
    left_out: dict[Path, str] = field(default_factory=dict)
    """Trace to message of each run that :meth:`traces` could not read."""

    @classmethod
    def of(cls, words: Sequence[Path]) -> NamedRuns:
        """Find the traces.

        Args:
            words: runs or their traces, folders that contain runs, and glob patterns. Runs below a
                folder, and those of a pattern, are in the order of their names and numbers.

        Raises:
            JobError: a word names no run.
        """
        if not words:
            raise JobError(f"RUN_DIR is missing: {_NEXT}")
        found: dict[Path, Path] = {}
        repeated: dict[Path, str] = {}
        for word in words:
            for file in _traces_of(word):
                same = Path(os.path.realpath(file))
                if same in found:
                    repeated[same] = f"{file} is named twice: it is shown once"
                found.setdefault(same, file)
        is_single = len(words) == 1 and trace_file(words[0]).is_file()
        return cls([*found.values()], is_single, [*repeated.values()])

    def traces(self, most_bytes: int = MOST_BYTES) -> Iterator[Trace]:
        """Read the traces in turn, and note those that cannot be read in :attr:`left_out`.

        Args:
            most_bytes: about the most memory for the counts of a trace.

        Raises:
            JobError: none can be read. The message is that of the first.
        """
        for file in self.files:
            try:
                trace = read_trace(file, most_bytes=most_bytes)
            except JobError as error:
                self.left_out[file] = str(error)
                if len(self.left_out) == len(self.files):
                    raise JobError(next(iter(self.left_out.values()))) from None
                continue
            yield trace

    @property
    def notes(self) -> list[str]:
        """Sentences about repeated and unreadable runs."""
        return [*self.repeated, *(f"left out: {error}" for error in self.left_out.values())]


def _traces_of(word: Path) -> list[Path]:
    """Find the traces of one word of the command line."""
    if trace_file(word).is_file():
        return [trace_file(word)]
    if word.is_dir():
        if found := _below(word):
            return found
        raise JobError(f"{word} has no {FILE_NAME}, and no folder below it has one: {_NEXT}")
    if not glob.has_magic(str(word)):
        raise JobError(f"{word}: there is no such folder or file: {_NEXT}")
    matches = map(Path, sorted(glob.glob(str(word), recursive=True), key=_by_number))
    found = []
    for match in matches:
        if match.is_dir():
            found += [trace_file(match)] if trace_file(match).is_file() else _below(match)
        elif match.suffix == ".arrow":
            found.append(match)
    if not found:
        raise JobError(f"{word} matches no run: {_NEXT}")
    return [*dict.fromkeys(found)]


def _below(folder: Path) -> list[Path]:
    """Find the traces below a folder. The folder of a run is not searched further."""

    def refuse(error: OSError) -> NoReturn:
        raise JobError(f"{error.filename} cannot be read ({error.strerror}): {_NEXT}")

    found, visited = [], set()
    for path, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if os.path.realpath(path) in visited:
            folders.clear()
            continue
        visited.add(os.path.realpath(path))
        if FILE_NAME in names:
            found.append(os.path.join(path, FILE_NAME))
            folders.clear()
    return [Path(path) for path in sorted(found, key=_by_number)]


def _by_number(path: str) -> list[str | int]:
    """Sort key with numbers by value: ``run_2`` before ``run_10``."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path)]
