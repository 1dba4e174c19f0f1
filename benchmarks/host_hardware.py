"""Measurement of this machine as a device for ``titan-moe-lb plan``.

It takes about a second. Redirect the output to a file, and pass that file to ``plan``:

    python -m benchmarks.host_hardware > host.toml
    titan-moe-lb plan --hardware host.toml
"""

from __future__ import annotations

import socket
import statistics
import threading
from collections.abc import Callable

import psutil
import tomli_w
import torch

from benchmarks.device_time import interleaved
from titan_moe_lb.costmodel.hardware.device import SPECS, Host

_BYTES = 32 * 2**20


def measure_host(*, size: int = 768) -> Host:
    """Measure this host, with one process as one rank.

    Times a BF16 matrix product of ``size`` x ``size`` in this process's threads, a copy of
    memory, and a TCP connection to this host, as gloo uses between processes. All ranks share
    one host, so there is no scale-out link, and its numbers repeat the scale-up ones. Peaks are
    the best of several runs, because other work on the machine can only slow a run down.
    """
    bandwidth, latency = _loopback()
    figures = {
        "bf16_flops": _matmul_flops(size),
        "memory_bytes": float(psutil.virtual_memory().total),
        "memory_bandwidth": _copy_bandwidth(),
        "scale_up_domain": 2**20,
        "scale_up_bandwidth": bandwidth,
        "scale_up_latency": latency,
        "scale_out_bandwidth": bandwidth,
        "scale_out_latency": latency,
    }
    return Host(name="this host", **figures, sources=dict.fromkeys(SPECS, "measured"))  # type: ignore[arg-type]


def as_toml(host: Host) -> str:
    """Format the TOML file that defines the device."""
    figures = {figure: getattr(host, figure) for figure in SPECS}
    return tomli_w.dumps({"name": host.name, "kind": "host", **figures, "sources": host.sources})


def _seconds(run: Callable[[], object], repeats: int = 7) -> list[float]:
    return interleaved({"": run}, repeats, torch.device("cpu"))[""]


def _matmul_flops(size: int) -> float:
    left = torch.randn(size, size, dtype=torch.bfloat16)
    right = torch.randn(size, size, dtype=torch.bfloat16)
    return 2 * size**3 / min(_seconds(lambda: left @ right))


def _copy_bandwidth() -> float:
    source = torch.ones(_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * _BYTES / min(_seconds(lambda: target.copy_(source)))


def _loopback() -> tuple[float, float]:
    """Measure TCP to this host: bytes/s in one direction, and seconds to start a message."""
    with socket.create_server(("localhost", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _address = server.accept()
    block = bytes(2**20)

    def echo() -> None:
        """Answer each message of 1 byte, and each complete sequence of blocks."""
        received = 0
        while data := far.recv(2**20):
            received += len(data)
            if received == 1 or received >= _BYTES:
                received = 0
                far.sendall(b"x")

    with near, far:
        near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        answering = threading.Thread(target=echo, daemon=True)
        answering.start()

        def ping() -> None:
            near.sendall(b"x")
            near.recv(1)

        def transfer() -> None:
            for _ in range(_BYTES // len(block)):
                near.sendall(block)
            near.recv(1)

        latency = statistics.median(_seconds(ping, repeats=100)) / 2
        seconds = min(_seconds(transfer))
        near.shutdown(socket.SHUT_WR)
        answering.join()
    return _BYTES / seconds, latency


if __name__ == "__main__":
    print(as_toml(measure_host()), end="")
