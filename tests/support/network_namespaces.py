"""Two machines in one: network namespaces that are joined only by a virtual cable."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import psutil
import pytest


@dataclass(frozen=True)
class Machine:
    """Network namespace that acts as a machine."""

    name: str
    address: str

    def pull_the_plug(self) -> None:
        """Kill every process at once, without notice to anyone."""
        for process in self._processes():
            with contextlib.suppress(psutil.Error):
                process.kill()

    def is_idle(self) -> bool:
        _gone, alive = psutil.wait_procs(self._processes(), timeout=10)
        return not alive

    def _processes(self) -> list[psutil.Process]:
        found = []
        for one in _ip("netns", "pids", self.name).split():
            with contextlib.suppress(psutil.Error):
                found.append(psutil.Process(int(one)))
        return [one for one in found if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


@contextlib.contextmanager
def two_machines() -> Iterator[tuple[Machine, Machine]]:
    """Make a pair of machines that reach only each other; skip the test if that is impossible."""
    why = "needs two network namespaces: root on Linux with `ip` (apt-get install iproute2)"
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip(why)
    pair = tuple(
        Machine(f"titan_moe_lb-{os.getpid()}-{number}", f"10.77.0.{number + 1}")
        for number in (0, 1)
    )
    try:
        try:
            for machine in pair:
                _ip("netns", "add", machine.name)
            _ip(
                *("link", "add", "cable", "netns", pair[0].name, "type", "veth"),
                *("peer", "name", "cable", "netns", pair[1].name),
            )
        except subprocess.CalledProcessError as error:
            pytest.skip(f"{why}; here: {error.stderr.strip()}")
        for machine in pair:
            _ip("-n", machine.name, "address", "add", f"{machine.address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                _ip("-n", machine.name, "link", "set", device, "up")
        yield pair
    finally:
        for machine in pair:
            with contextlib.suppress(subprocess.CalledProcessError):
                machine.pull_the_plug()
                _ip("netns", "delete", machine.name)


def _ip(*arguments: str) -> str:
    command = ["ip", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
