"""The environment of a job of one process, without a launcher."""

from __future__ import annotations

import os
import socket


def announce() -> None:
    """Set what torch's ``env://`` rendezvous reads."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
