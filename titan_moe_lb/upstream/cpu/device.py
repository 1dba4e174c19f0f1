"""A device module for the host, with the memory of this process.

Upstream fact: torchtitan reads memory through the accelerator's module (``torch.cuda`` and the
like), and through ``torch.cuda`` where there is none. ``torch.cpu`` lacks functions that it calls.
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
    """``torch.cpu`` with the memory queries of an accelerator, in bytes.

    "Active" and "reserved" are both the resident memory of this process; the capacity is the
    physical memory of the machine. The peak is the largest value of the queries since the last
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
        return 0

    def get_device_name(self, device: object = None) -> str:
        return _processor_name()

    def get_device_properties(self, device: object = None) -> SimpleNamespace:
        return SimpleNamespace(name=_processor_name(), total_memory=psutil.virtual_memory().total)

    def memory_stats(self, device: object = None) -> dict[str, int]:
        with self._lock:
            self._peak_bytes = max(self._peak_bytes, self._process.memory_info().rss)
            return {
                "active_bytes.all.peak": self._peak_bytes,
                "reserved_bytes.all.peak": self._peak_bytes,
                "num_alloc_retries": 0,
                "num_ooms": 0,
            }

    def reset_peak_memory_stats(self, device: object = None) -> None:
        with self._lock:
            self._peak_bytes = 0

    def empty_cache(self) -> None:
        """The host allocator keeps no cache of its own to empty."""


def use_host_device() -> None:
    """Point torchtitan at the host.

    Upstream fact: ``torchtitan.tools.utils`` binds ``device_type`` and ``device_module`` at import,
    to ``cuda`` where no accelerator is found. Modules that have imported both names, ours too, get
    the host's as well.
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
