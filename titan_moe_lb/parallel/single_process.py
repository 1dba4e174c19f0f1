"""What torch.distributed has to know of a process that no launcher has started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def announce_unless_launched() -> None:
    """Announce this process as the only one, unless a launcher has announced it."""
    if "RANK" not in os.environ:
        announce()


@contextmanager
def announced() -> Iterator[None]:
    """Announce this process as the only one within, unless a launcher has announced it."""
    before = {name: os.environ.get(name) for name in _VARIABLES}
    announce_unless_launched()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def announce(num_processes: int = 1) -> None:
    """Announce this process as rank 0.

    Args:
        num_processes: of the job; in a dry run the others are not there.
    """
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(num_processes))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")  # any that is free
