"""Log file and console of a process: all messages go to the file, a few to the console.

The console is standard output. It shows the lines of the steps, the messages of titan_moe_lb,
all errors, and torchtitan's warnings once training runs. Earlier warnings are left out: they
concern choices that torchtitan made itself. Standard error is the log file, because torch,
gloo and NCCL write there without Python's logging.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from rich.console import Console
from torchtitan.components import metrics

from titan_moe_lb.terminal.run_folder import is_remote

_OURS = str(Path(__file__).parents[2]) + os.sep
_COLOR = re.compile(r"\x1b\[[\d;]*m")
_LOSS = re.compile(r"(\x1b\[[\d;]*m)?loss: +-?[\d.]+ *")
_MFU = re.compile(r" *(\x1b\[[\d;]*m)?mfu: +[\d.]+%")


@dataclass(kw_only=True)
class StepLine:
    """Values that a rank knows for torchtitan's line of a step."""

    loss: bool = True
    """The rank has a part of the last pipeline stage, and so the loss."""

    peak_flops: bool = True
    """torchtitan knows the device's peak FLOPS; for an unknown device it uses the A100's."""


def folder_of(dump_folder: str) -> Path:
    """Return the folder of a run's log files: ``logs`` here if the run's folder is remote."""
    return Path("logs") if is_remote(dump_folder) else Path(dump_folder, "logs")


def divert_errors(path: Path) -> TextIO:
    """Redirect standard error of this process to a file.

    Returns:
        The previous standard error, for the last message.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    console = os.fdopen(os.dup(2), "w", buffering=1)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 2)
    os.close(file)
    return console


def report(line: str, console: TextIO) -> None:
    """Print a line of ours to the console, or to the log if the terminal is gone."""
    for stream in (console, sys.stderr):
        with contextlib.suppress(OSError):
            print(f"titan_moe_lb: {line}", file=stream, flush=True)
            return


def begin(
    *,
    shown: bool,
    prefix: str = "",
    known: StepLine,
    first_step: Callable[[], None] = lambda: None,
) -> None:
    """Configure Python's logging in this process.

    If the rank is not ``shown``, standard output is the log file too. ``first_step`` is called at
    the first line of a step.
    """
    logging.raiseExceptions = False  # else each line prints a traceback once the disk is full
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    # torchtitan logs through the root, so this filters its lines before any handler.
    root.filters[:] = [_HonestSteps(known)]
    file = logging.StreamHandler(sys.stderr)
    file.setFormatter(_Plain("%(asctime)s %(levelname)s %(message)s"))
    root.handlers[:] = [file]
    if not shown:
        os.dup2(2, 1)
        return
    console = logging.StreamHandler(sys.stdout)
    console.setFormatter(_ForUsers(prefix))
    console.addFilter(_OfInterest(first_step))
    root.addHandler(console)


def _is_of_a_step(record: logging.LogRecord) -> bool:
    return record.pathname == metrics.__file__ and record.funcName in ("log", "log_validation")


class _HonestSteps(logging.Filter):
    """Remove values that this rank cannot know from torchtitan's line of a step."""

    def __init__(self, known: StepLine) -> None:
        super().__init__()
        self._known = known

    def filter(self, record: logging.LogRecord) -> bool:
        if _is_of_a_step(record):
            if not self._known.loss:
                record.msg = _LOSS.sub("", record.msg)
            if not self._known.peak_flops:
                record.msg = _MFU.sub("", record.msg)
        return True


class _OfInterest(logging.Filter):
    """Select the messages for the console, each warning once."""

    def __init__(self, first_step: Callable[[], None]) -> None:
        super().__init__()
        self._first_step = first_step
        self._training = False
        self._warned: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if _is_of_a_step(record):
            if not self._training:
                self._first_step()
            self._training = True
            return True
        ours = record.pathname.startswith(_OURS)
        if record.levelno < logging.WARNING:
            return ours
        new = record.getMessage() not in self._warned
        self._warned.add(record.getMessage())
        return new and (ours or self._training or record.levelno >= logging.ERROR)


class _Plain(logging.Formatter):
    """Format a line of the log file, without colors."""

    def format(self, record: logging.LogRecord) -> str:
        return _COLOR.sub("", super().format(record))


class _ForUsers(logging.Formatter):
    """Format the message alone; in color on a terminal with colors, unless NO_COLOR is set."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self._prefix = prefix
        terminal = Console(file=sys.stdout)
        self._in_color = terminal.color_system is not None and not terminal.no_color

    def format(self, record: logging.LogRecord) -> str:
        word = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        line = f"{self._prefix}{word}{record.getMessage()}"
        if record.exc_info:
            line += " (the traceback is in the log)"
        return line if self._in_color else _COLOR.sub("", line)
