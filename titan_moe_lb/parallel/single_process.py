"""Environment variables that identify a process of a job for torch.distributed and torchtitan."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


def is_launched() -> bool:
    """Return True if a launcher has set the variables of this process."""
    return "RANK" in os.environ


def world_size() -> int:
    """Return the number of processes of this process's job: 1 without a launcher."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def announce(*, rank: int = 0, world_size: int | None = None) -> None:
    """Set the variables of a process without a launcher.

    ``world_size`` is that of a dry run, in which the other processes do not exist.
    """
    os.environ.update(_variables(rank, world_size))


@contextmanager
def announced(*, rank: int = 0, world_size: int | None = None) -> Iterator[None]:
    """Set the variables like :func:`announce`, and restore them at the end."""
    variables = _variables(rank, world_size)
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _variables(rank: int, world_size: int | None) -> dict[str, str]:
    # torchtitan reads the size of a fake process group from NGPU, and plan the ranks of a job.
    fake = {} if world_size is None else {"NGPU": str(world_size)}
    return {
        **fake,
        "RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(world_size or 1),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "0",  # any that is free
    }
