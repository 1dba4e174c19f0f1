"""Apply faults in turn, and compare each run with the same undisturbed job."""

from __future__ import annotations

import itertools
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.faults import FAULTS, NotSurvived
from tests.chaos.job import differences, start


@dataclass
class Tally:
    tried: int = 0
    survived: int = 0
    refused: int = 0
    line: str = ""
    """Last line of a refusal."""


def peaceful_run(folder: Path) -> Path:
    """Run the job undisturbed, as the reference of all others."""
    end = start(folder / "peace")
    assert end.ok, end
    return folder / "peace"


def run(folder: Path, number: int, seed: int, only: str = "", say=print) -> dict[str, Tally]:
    """Try ``number`` faults, and print a line for each.

    Args:
        folder: an empty folder.
        only: words that the names of the kinds contain.
    """
    peace = peaceful_run(folder)
    kinds = [kind for kind in FAULTS if only in kind]
    tallies = {kind: Tally() for kind in kinds}
    for index, kind in enumerate(itertools.islice(itertools.cycle(kinds), number)):
        begun = time.monotonic()
        verdict = try_one(
            kind, random.Random(f"{seed}-{index}"), folder / "run", peace, tallies[kind]
        )
        say(f"{index + 1:4}  {time.monotonic() - begun:5.1f} s  {verdict}", flush=True)
    return tallies


def try_one(kind: str, dice: random.Random, folder: Path, peace: Path, tally: Tally) -> str:
    """Try one fault; return its report in words."""
    shutil.rmtree(folder, ignore_errors=True)
    tally.tried += 1
    try:
        report = FAULTS[kind](dice, folder)
    except NotSurvived as error:
        return f"NOT SURVIVED  {error}"
    wrong = differences(folder, peace, report.lost)
    if wrong:
        return f"DIFFERS in {', '.join(wrong[:4])} ({len(wrong)})  {report.what}"
    tally.survived += 1
    tally.refused += bool(report.refused)
    tally.line = report.refused or tally.line
    lost = f"; lost with it: the record of steps {sorted(report.lost)}" if report.lost else ""
    refused = f"\n            refused: {report.refused}" if report.refused else ""
    return f"equal  {report.what}{lost}{refused}"
