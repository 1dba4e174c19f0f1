"""The launcher of a job in a process that has the imports already."""

from __future__ import annotations

import os

from titan_moe_lb.run import launch
from titan_moe_lb.upstream import cpu


def run(arguments: list[str], console: str) -> None:
    """What ``titan-moe-lb train`` does, with what it says in a file."""
    file = os.open(console, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    for name in ("RANK", "NGPU"):
        os.environ.pop(name, None)
    launch.main(arguments)
    cpu.leave()
