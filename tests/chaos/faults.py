"""Random faults of a job, each followed by a restart of the same command."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.fault_signals import FaultSignal
from tests.chaos.job import INTERVAL, RANKS, STEPS, start
from titan_moe_lb.checkpoints.resume_point import is_finished, steps_in
from titan_moe_lb.errors import JobError
from titan_moe_lb.traces.trace import FILE_NAME, read_trace

SAVED = tuple(range(INTERVAL, STEPS, INTERVAL))
"""Steps with a checkpoint that are followed by further steps."""


@dataclass
class Report:
    """Report on a fault and on the restarts of the job."""

    what: str
    refused: str = ""
    """Line that refused to continue without a decision; empty if there was none."""
    lost: frozenset[int] = frozenset()
    """Steps whose record in the trace the fault destroyed."""


Fault = Callable[[random.Random, Path], Report]


class NotSurvived(AssertionError):
    pass


def _restart(folder: Path, report: Report) -> Report:
    """Start the same command again; if it is refused, follow its message, once."""
    end = start(folder)
    if not end.ok and (said := re.search(r"set checkpoint\.load_step = (\d+)", end.line)):
        report.refused = end.line
        end = start(folder, None, f"--checkpoint.load_step={said[1]}")
    if not end.ok:
        raise NotSurvived(f"{report.what}: the restart ended with {end.status}: {end.line}")
    return report


def _signal(name: str, number: int, who: str, *moments: str) -> Fault:
    """Signal one rank or all ranks at a random moment."""

    def fault(dice: random.Random, folder: Path) -> Report:
        moment = dice.choice(moments)
        ranks = (dice.randrange(RANKS),) if who == "one" else tuple(range(RANKS))
        if moment == "start":
            step, delay = 0, dice.uniform(0, 2.0)
        elif moment in ("save", "saved"):
            step, delay = dice.choice(SAVED), dice.uniform(0, 0.06)
        elif moment == "logged":
            step, delay = dice.choice(SAVED), 0.0
        else:
            step, delay = dice.randrange(2, STEPS + 1), dice.uniform(0, 0.15)
        end = start(folder, FaultSignal(number, ranks, moment, step, delay))
        report = Report(f"{name}: rank {ranks}, {moment} {step} + {delay * 1e3:.0f} ms")
        survives = number == signal.SIGSTOP
        if survives and not end.ok:
            raise NotSurvived(f"{report.what}: it ended with {end.status}: {end.line}")
        # A late signal may find the job at its end.
        return report if end.ok else _restart(folder, report)

    return fault


def _stop_at(dice: random.Random, folder: Path, *, least: int = 2 * INTERVAL) -> int:
    """Kill the job in a step after at least two checkpoints; return that step."""
    step = dice.randrange(least + 1, STEPS + 1)
    end = start(folder, FaultSignal(signal.SIGKILL, tuple(range(RANKS)), "step", step))
    if end.ok:
        raise NotSurvived("the job was not killed")
    return step


def _newest(folder: Path) -> Path:
    steps = steps_in(folder / "checkpoint")
    return steps[max(step for step, path in steps.items() if is_finished(path))]


def _at_checkpoint(name: str, damage: Callable[[random.Random, Path], str]) -> Fault:
    """Damage the newest checkpoint of a killed job."""

    def fault(dice: random.Random, folder: Path) -> Report:
        _stop_at(dice, folder)
        newest = _newest(folder)
        what = damage(dice, newest)
        return _restart(folder, Report(f"{name}: {what} of {newest.name}"))

    return fault


def _cut(file: Path, dice: random.Random) -> str:
    size = file.stat().st_size
    keep = dice.randrange(size)
    with open(file, "r+b") as opened:
        opened.truncate(keep)
    return f"{file.name} cut to {keep:,} of {size:,} bytes"


def _flip(file: Path, dice: random.Random) -> str:
    content = bytearray(file.read_bytes())
    place, bit = dice.randrange(len(content)), dice.randrange(8)
    content[place] ^= 1 << bit
    file.write_bytes(content)
    return f"bit {bit} of byte {place:,} of {file.name} flipped"


def _a_file(dice: random.Random, step: Path) -> Path:
    return dice.choice(sorted(step.glob("*.distcp")))


def _remove(file: Path) -> str:
    file.unlink()
    return f"{file.name} removed"


def _at_trace(damage: Callable[[Path, random.Random], str]) -> Fault:
    """Damage the trace of a killed job.

    Records before the checkpoint that are destroyed cannot be recorded again. All other steps are
    present exactly once.
    """

    def fault(dice: random.Random, folder: Path) -> Report:
        _stop_at(dice, folder)
        what = damage(folder / FILE_NAME, dice)
        try:
            whole = read_trace(folder).steps.tolist()
        except JobError:
            whole = []
        resumed = int(_newest(folder).name.removeprefix("step-"))
        lost = frozenset(range(1, resumed + 1)) - frozenset(whole)
        return _restart(folder, Report(f"trace: {what}", lost=lost))

    return fault


def _full_disk(dice: random.Random, folder: Path) -> Report:
    """Fill the disk in the middle of a save, then make room again."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", str(folder)], check=True)
    try:
        # What one checkpoint takes, from a first part of the run.
        step = _stop_at(dice, folder)
        size = sum(file.stat().st_size for file in _newest(folder).iterdir())
        filler = folder / "filler"
        left = shutil.disk_usage(folder).free - dice.randrange(size)
        with open(filler, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, left)
        end = start(folder)
        report = Report(f"disk full in the save after step {step - 1}", refused=end.line)
        if end.ok or "full" not in end.line:
            raise NotSurvived(f"{report.what}: it ended with {end.status}: {end.line}")
        filler.unlink()
        _restart(folder, report)
        shutil.copytree(folder, folder.with_name("copy"))
        return report
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
        if (copy := folder.with_name("copy")).exists():
            folder.rmdir()
            copy.rename(folder)


FAULTS: dict[str, Fault] = {
    "one rank killed in a step": _signal("killed", signal.SIGKILL, "one", "step"),
    "one rank killed while the job starts": _signal("killed", signal.SIGKILL, "one", "start"),
    "one rank killed between trace and checkpoint": _signal(
        "killed", signal.SIGKILL, "one", "logged"
    ),
    "one rank killed while a checkpoint is written": _signal(
        "killed", signal.SIGKILL, "one", "save"
    ),
    "all ranks killed while a checkpoint is written": _signal(
        "killed", signal.SIGKILL, "all", "save"
    ),
    "all ranks killed in a step": _signal("killed", signal.SIGKILL, "all", "step", "saved"),
    "SIGINT to all ranks": _signal("SIGINT", signal.SIGINT, "all", "step", "save"),
    "SIGTERM to all ranks": _signal("SIGTERM", signal.SIGTERM, "all", "step", "save"),
    "one rank aborts": _signal("SIGABRT", signal.SIGABRT, "one", "step", "save"),
    "one rank stands still for a second": _signal(
        "stopped", signal.SIGSTOP, "one", "step", "save", "logged"
    ),
    "newest checkpoint cut": _at_checkpoint(
        "cut", lambda dice, step: _cut(_a_file(dice, step), dice)
    ),
    "metadata of the newest checkpoint cut": _at_checkpoint(
        "cut", lambda dice, step: _cut(step / ".metadata", dice)
    ),
    "a bit of the newest checkpoint flipped": _at_checkpoint(
        "flipped", lambda dice, step: _flip(_a_file(dice, step), dice)
    ),
    "a bit of the metadata flipped": _at_checkpoint(
        "flipped", lambda dice, step: _flip(step / ".metadata", dice)
    ),
    "a file of the newest checkpoint removed": _at_checkpoint(
        "removed", lambda dice, step: _remove(_a_file(dice, step))
    ),
    "metadata of the newest checkpoint removed": _at_checkpoint(
        "removed", lambda dice, step: _remove(step / ".metadata")
    ),
    "disk full": _full_disk,
    "trace cut": _at_trace(_cut),
    "a bit of the trace flipped": _at_trace(_flip),
}
