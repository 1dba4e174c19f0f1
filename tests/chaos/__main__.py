"""Apply N faults to a job, each followed by a restart; exit with 1 if the job did not survive
one."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import tyro

import tests.support.gpus  # noqa: F401
from tests.chaos import run


@dataclass
class Arguments:
    faults: int = 100
    """Total number of faults; the kinds take turns."""

    seed: int = 0

    only: str = ""
    """Words in the names of the kinds to try; empty: all."""


def main() -> None:
    arguments = tyro.cli(Arguments)
    logging.disable()
    with TemporaryDirectory(prefix="titan_moe_lb-chaos-") as folder:
        tallies = run.run(Path(folder), arguments.faults, arguments.seed, arguments.only)
    for kind, tally in tallies.items():
        print(
            f"{kind:48} {tally.tried:3} tried {tally.survived:3} survived  {tally.refused:3} refused first"
        )
    sys.exit(any(tally.tried != tally.survived for tally in tallies.values()))


if __name__ == "__main__":
    main()
