"""Device module for the host, with the memory of this process.

Upstream fact: torchtitan reads memory through the accelerator's module, and through ``torch.cuda``
without an accelerator. ``torch.cpu`` lacks functions that it calls.
"""

from __future__ import annotations

import platform
import sys
import threading
from types import ModuleType, SimpleNamespace

import psutil
import torch


def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo") as cpuinfo:
            for line in cpuinfo:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


class HostDevice(ModuleType):
    """Module like ``torch.cpu``, with the memory queries of an accelerator, in bytes.

    "Active" and "reserved" are both the resident memory of this process. The capacity is the
    physical memory of the machine. The peak is the largest value of all queries since the last
    reset.
    """

    def __init__(self) -> None:
        super().__init__("titan_moe_lb.upstream.cpu.host_device")
        self._process = psutil.Process()
        self._peak_bytes = 0
        self._lock = threading.Lock()

    def __getattr__(self, name: str):
        return getattr(torch.cpu, name)

    def current_device(self) -> int:
        """Return 0: the host is one device."""
        return 0

    def get_device_name(self, device: object = None) -> str:
        """Return the name of the processor."""
        return _processor_name()

    def get_device_properties(self, device: object = None) -> SimpleNamespace:
        """Return the name of the processor and the physical memory of the machine, in bytes."""
        return SimpleNamespace(name=_processor_name(), total_memory=psutil.virtual_memory().total)

    def memory_stats(self, device: object = None) -> dict[str, int]:
        """Return the peak memory in bytes, under the keys that torchtitan reads."""
        with self._lock:
            self._peak_bytes = max(self._peak_bytes, self._process.memory_info().rss)
            return {
                "active_bytes.all.peak": self._peak_bytes,
                "reserved_bytes.all.peak": self._peak_bytes,
                "num_alloc_retries": 0,
                "num_ooms": 0,
            }

    def reset_peak_memory_stats(self, device: object = None) -> None:
        """Start a new peak."""
        with self._lock:
            self._peak_bytes = 0

    def empty_cache(self) -> None:
        """Do nothing: the host allocator has no cache to empty."""


def use_host_device() -> None:
    """Point torchtitan at the host.

    Upstream fact: ``torchtitan.tools.utils`` binds ``device_type`` and ``device_module`` at import,
    to ``cuda`` if it finds no accelerator. This function replaces both names there, and in all
    modules of torchtitan and of this package that have imported them.
    """
    from torchtitan.tools import utils

    host = {"device_type": "cpu", "device_module": HostDevice()}
    bound = {name: getattr(utils, name) for name in host}
    packages = ("torchtitan.", "titan_moe_lb.")
    modules = [module for name, module in sys.modules.items() if name.startswith(packages)]
    for module in modules:
        for name, value in bound.items():
            if vars(module).get(name) is value:
                setattr(module, name, host[name])
