"""The variables that say how a job is started, checked before it is."""

from __future__ import annotations

import os
import re
import socket
import typing

from torchtitan.config import CommConfig

from titan_moe_lb.errors import JobError, nearest


def positive(variable: str, default: int) -> int:
    """A variable that counts something."""
    text = os.environ.get(variable) or str(default)
    if not text.isdecimal() or int(text) < 1:
        raise JobError(f"{variable}={text} must be a whole number of at least 1")
    return int(text)


def check_mode() -> None:
    mode = os.environ.get("COMM_MODE")
    modes = typing.get_args(typing.get_type_hints(CommConfig)["mode"])
    if mode and mode not in modes:
        raise JobError(f"COMM_MODE={mode} does not exist; {nearest(mode, modes)}")


def check_nodes(nodes: int) -> None:
    """NODE_RANK and RDZV_ENDPOINT: how the nodes of a job find each other."""
    endpoint, rank = os.environ.get("RDZV_ENDPOINT"), os.environ.get("NODE_RANK")
    if nodes > 1 and not endpoint:
        raise JobError(
            f"NNODES={nodes} needs RDZV_ENDPOINT=HOST:PORT of one node, the same on every node"
        )
    if rank and not (rank.isdecimal() and int(rank) < nodes):
        raise JobError(
            f"NODE_RANK={rank} must be the number of this node, from 0 to {nodes - 1} "
            f"with NNODES={nodes}"
        )
    if not endpoint:
        return
    found = re.fullmatch(r"([^\s:/]+)(?::(\d+))?", endpoint)
    if found is None or not int(nodes > 1) <= int(found[2] or 1) < 2**16:
        raise JobError(f"RDZV_ENDPOINT={endpoint} must be HOST:PORT, as in node0:29500")
    try:
        socket.getaddrinfo(found[1], None)
    except OSError as error:
        raise JobError(
            f"RDZV_ENDPOINT={endpoint}: the host {found[1]!r} is not known here ({error.strerror})"
        ) from None


def check_shown_ranks(processes: int) -> None:
    """LOG_RANK: ranks that exist."""
    text = os.environ.get("LOG_RANK", "")
    for rank in text.split(",") if text else ():
        if not rank.isdecimal():
            raise JobError(f"LOG_RANK={text} must be ranks with commas between them, as in 0,1")
        if int(rank) >= processes:
            raise JobError(
                f"LOG_RANK={text}: there is no rank {rank}; the job has {processes} process(es), "
                "numbered from 0"
            )
