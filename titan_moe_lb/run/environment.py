"""The variables that say how a job is started, checked before it is."""

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
            f"RDZV_ENDPOINT={endpoint}: the host {host!r} is not known here ({error.strerror})"
        ) from None
    if nodes == 1 or rank == "0":  # this node opens the port; without ranks the nodes find out
        try:
            socket.create_server(("", int(found[3] or DEFAULT_PORT))).close()
        except OSError as error:
            raise JobError(
                f"RDZV_ENDPOINT={endpoint}: the port cannot be opened here "
                f"({os.strerror(error.errno or 0)}): stop what holds it, or take another"
            ) from None


def choose_network() -> None:
    """Let gloo talk to the other nodes by the network that RDZV_ENDPOINT is in.

    It takes the address of this machine's name otherwise, which is often 127.0.0.1 or
    127.0.1.1, where no other node can reach it. NCCL finds a network by itself.
    """
    host, port = parse_rendezvous_endpoint(os.environ["RDZV_ENDPOINT"], DEFAULT_PORT)
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
        probe.connect(address)  # sends nothing: it asks for the route alone
        here = probe.getsockname()[0]
        for interface, addresses in psutil.net_if_addrs().items():
            if here in [one.address.partition("%")[0] for one in addresses]:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def run_name(nodes: int) -> str:
    """What the nodes of a run have in common, and two runs at one time have not."""
    if nodes > 1:
        return f"NNODES={nodes} RDZV_ENDPOINT={os.environ['RDZV_ENDPOINT']}"
    return f"process {os.getpid()} of {socket.gethostname()}, {uuid.uuid4()}"


def hand_on_run(run: str) -> None:
    """Let the ranks that this process starts know their run, and end with this process."""
    os.environ.update({_RUN: run, **parent_process.launcher_environment()})


def joined_run() -> str:
    """The run of this rank: as its launcher named it, else that of torchrun's agent."""
    names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
    agent = " ".join(os.environ.get(name, "") for name in names)
    return os.environ.pop(_RUN, None) or f"torchrun {agent}"


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
