"""End a process together with the launcher that started it, by whatever signal that one died.

The kernel sends the signal (``prctl(2)``, PR_SET_PDEATHSIG). So it also ends a process that waits
in a collective, compiles or is stopped. Only Linux has this call.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_LAUNCHER = "TITAN_MOE_LB_LAUNCHER"
_PR_SET_PDEATHSIG = 1


def launcher_environment() -> dict[str, str]:
    """Variables for the processes that this process starts and that must not outlive it."""
    return {_LAUNCHER: str(os.getpid())}


def end_with_launcher(*, or_agent: bool = False) -> None:
    """Ask for SIGKILL at the death of the parent, if that has set :func:`launcher_environment`.

    A launcher starts its processes from a thread that lives as long as they do: to the kernel,
    this thread is the parent.

    Args:
        or_agent: also if the parent is an agent of torchrun.
    """
    launcher = os.environ.pop(_LAUNCHER, None)
    of_agent = or_agent and "TORCHELASTIC_RUN_ID" in os.environ
    if sys.platform != "linux" or not (launcher or of_agent):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
    if launcher and os.getppid() != int(launcher):
        os.kill(os.getpid(), signal.SIGKILL)
