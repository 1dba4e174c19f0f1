"""Damage files of every kind, N times in all; exit with 1 at the first traceback."""

from __future__ import annotations

import logging
import resource
import sys
import traceback
import warnings
from dataclasses import dataclass
from typing import Annotated

import psutil
import tyro

import tests.support.gpus  # noqa: F401
from tests.fuzz.run import fuzz
from tests.fuzz.targets import TARGETS

ROOM = 6 * 2**30
"""Address space beyond that of the imports, in bytes; a case that needs more gets a MemoryError."""


@dataclass
class Arguments:
    cases: int = 1000
    """Number of cases, divided among the targets."""

    seed: int = 0

    only: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Target to run; repeat the flag for more. Default: all."""


def main() -> None:
    arguments = tyro.cli(Arguments)
    logging.disable()
    warnings.simplefilter("ignore")
    used = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
    targets = arguments.only or tuple(TARGETS)
    for target in targets:
        try:
            print(fuzz(target, -(-arguments.cases // len(targets)), arguments.seed), flush=True)
        except BaseException as error:
            traceback.print_tb(error.__traceback__)
            # A case may be a whole file.
            sys.exit(f"{target}: {''.join(traceback.format_exception_only(error))[:2000]}")


if __name__ == "__main__":
    main()
