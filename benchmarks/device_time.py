"""Times of operations on a device, in turn, and the bandwidth of its memory. Torch alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def interleaved(
    runs: Mapping[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Time operations in turn, so that other work disturbs all of them alike.

    The first one of a turn rotates. Two turns warm up.

    Returns:
        Seconds of each run, by name of the operation.
    """
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-2, repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            synchronize(device)
            started = time.perf_counter()
            runs[name]()
            synchronize(device)
            if turn < 0:
                continue
            seconds[name].append(time.perf_counter() - started)
    return seconds


def copy_bandwidth(device: torch.device) -> float:
    """Bandwidth of a large copy in bytes/s, reads and writes together."""
    source = torch.empty(
        2**28 if device.type == "cuda" else 2**24, dtype=torch.uint8, device=device
    )
    target = torch.empty_like(source)
    seconds = interleaved({"copy": lambda: target.copy_(source)}, 10, device)["copy"]
    return 2 * source.numel() / statistics.median(seconds)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def device_name(device: torch.device) -> str:
    """Name the device of a measurement."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU threads"
