"""What torch.distributed has to know of a process that no launcher has started."""

from __future__ import annotations

import os


def announce_unless_launched() -> None:
    """Announce this process as the only one, unless a launcher has announced it."""
    if "RANK" not in os.environ:
        announce()


def announce(num_processes: int = 1) -> None:
    """Announce this process as rank 0.

    Args:
        num_processes: of the job; in a dry run the others are not there.
    """
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(num_processes))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")  # any that is free
