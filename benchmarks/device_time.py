"""Times of operations on a device, in turn, and the bandwidth of its memory. Torch alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def interleaved(
    runs: Mapping[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Time some operations in turn, after one warm-up of each.

    Args:
        runs: operations by name.
        repeats: runs of each.
        device: device that the operations run on.

    Returns:
        Seconds of each run.
    """
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            synchronize(device)
            started = time.perf_counter()
            run()
            synchronize(device)
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
