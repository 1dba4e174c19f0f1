"""End a process when its launcher dies, by whatever signal.

The kernel sends SIGKILL (``prctl(2)``, PR_SET_PDEATHSIG). This also ends a process that waits in a
collective, compiles or is stopped. Only Linux has this call.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_LAUNCHER = "TITAN_MOE_LB_LAUNCHER"
_PR_SET_PDEATHSIG = 1


def launcher_environment() -> dict[str, str]:
    """Return the variables for child processes that must not outlive this process."""
    return {_LAUNCHER: str(os.getpid())}


def end_with_launcher(*, or_agent: bool = False) -> None:
    """Request SIGKILL at the death of the parent, if the parent set :func:`launcher_environment`.

    To the kernel, the parent is the thread that started this process. In a launcher, that
    thread lives as long as its processes.
    """
    launcher = os.environ.pop(_LAUNCHER, None)
    of_agent = or_agent and "TORCHELASTIC_RUN_ID" in os.environ
    if sys.platform != "linux" or not (launcher or of_agent):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
    if launcher and os.getppid() != int(launcher):
        os.kill(os.getpid(), signal.SIGKILL)
