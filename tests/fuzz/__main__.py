"""Damage every kind of file N times in all; ends with status 1 at the first traceback."""

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
"""Bytes of addresses beyond those of the imports: a case that wants more ends in MemoryError."""


@dataclass
class Arguments:
    cases: int = 1000
    """In all, shared out to the targets."""

    seed: int = 0

    only: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A target; give it once for each. Default: all of them."""


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
