"""Environment variables of a launch, and their checks."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import typing
import uuid

import psutil
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torchtitan.config import CommConfig

from titan_moe_lb.errors import JobError, nearest
from titan_moe_lb.run import parent_process

DEFAULT_PORT = 29500
_RUN = "TITAN_MOE_LB_RUN"


def positive(variable: str, default: int) -> int:
    """Read a variable that counts something."""
    text = os.environ.get(variable) or str(default)
    if not text.isdecimal() or int(text) < 1:
        raise JobError(f"{variable}={text} must be a whole number of at least 1")
    return int(text)


def check_mode() -> None:
    """Check that ``COMM_MODE`` is a mode of torchtitan."""
    mode = os.environ.get("COMM_MODE")
    modes = typing.get_args(typing.get_type_hints(CommConfig)["mode"])
    if mode and mode not in modes:
        raise JobError(f"COMM_MODE={mode} does not exist; {nearest(mode, modes)}")


def check_nodes(nodes: int) -> None:
    """Check RDZV_TIMEOUT, RDZV_ENDPOINT and NODE_RANK, by which the nodes find each other."""
    positive("RDZV_TIMEOUT", 900)
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
    found = re.fullmatch(r"(?:([^\s:/\[\]]+)|\[([\da-fA-F:.]+)\])(?::(\d+))?", endpoint)
    if found is None or not int(nodes > 1) <= int(found[3] or 1) < 2**16:
        raise JobError(
            f"RDZV_ENDPOINT={endpoint} must be HOST:PORT, as in node0:29500 or [::1]:29500"
        )
    host = found[1] or found[2]
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise JobError(
            f"RDZV_ENDPOINT={endpoint}: cannot resolve the host {host!r} ({error.strerror}); set a host that this node can reach"
        ) from None
    # This node opens the port. Without NODE_RANK, the nodes find out later which one does.
    if nodes == 1 or rank == "0":
        try:
            socket.create_server(("", int(found[3] or DEFAULT_PORT))).close()
        except OSError as error:
            raise JobError(
                f"RDZV_ENDPOINT={endpoint}: the port cannot be opened here "
                f"({os.strerror(error.errno or 0)}): stop the program that uses it, or set another port"
            ) from None


def choose_network() -> None:
    """Select the network interface for gloo: the one on the route to RDZV_ENDPOINT.

    By default, gloo uses the address of this machine's host name. This is often 127.0.0.1 or
    127.0.1.1, which no other node can reach. NCCL finds an interface by itself.
    """
    host, port = parse_rendezvous_endpoint(os.environ["RDZV_ENDPOINT"], DEFAULT_PORT)
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
        probe.connect(address)  # selects the route; a datagram socket sends nothing here
        here = probe.getsockname()[0]
        for interface, addresses in psutil.net_if_addrs().items():
            if here in [one.address.partition("%")[0] for one in addresses]:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def run_name() -> str:
    """Return a name that no other run has."""
    return f"process {os.getpid()} of {socket.gethostname()}, {uuid.uuid4()}"


def meeting_id(folder: str) -> str:
    """Return the id by which the nodes of a run find each other: of RDZV_ID, else of its folder.

    The nodes agree on it before they can talk. Two runs at one RDZV_ENDPOINT do not meet.
    """
    agreed = os.environ.get("RDZV_ID") or os.path.abspath(folder)
    return uuid.uuid5(uuid.NAMESPACE_OID, agreed).hex


def hand_on_run(run: str) -> None:
    """Set the variables from which child processes read their run and its launcher."""
    os.environ.update({_RUN: run, **parent_process.launcher_environment()})


def joined_run() -> str:
    """Return the name of this rank's run: from our launcher, else from torchrun's agent."""
    names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
    agent = " ".join(os.environ.get(name, "") for name in names)
    return os.environ.pop(_RUN, None) or f"torchrun {agent}"


def check_shown_ranks(processes: int) -> None:
    """Check that LOG_RANK lists ranks of the job."""
    text = os.environ.get("LOG_RANK", "")
    for rank in text.split(",") if text else ():
        if not rank.isdecimal():
            raise JobError(f"LOG_RANK={text} must be ranks with commas between them, as in 0,1")
        if int(rank) >= processes:
            raise JobError(
                f"LOG_RANK={text}: there is no rank {rank}; the job has {processes} process(es), "
                "numbered from 0"
            )
