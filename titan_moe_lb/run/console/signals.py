"""Signal handling that ends a process at once, even while its main thread is in C++."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SAME = 1.0
"""Seconds in which signals count as one: a scheduler signals the launcher and its ranks."""
_handled: set[signal.Signals] = set()
"""Signals that :func:`ended_by` handles in this process."""


def heeded() -> list[signal.Signals]:
    """Return the signals of ``ENDING`` that are not ignored; ``nohup`` ignores SIGHUP."""
    return [one for one in ENDING if signal.getsignal(one) != signal.SIG_IGN]


@contextlib.contextmanager
def ended_by(end: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Call ``end`` in a separate thread when one of :func:`heeded` arrives; a second one kills.

    Python runs its handlers in the main thread, and only after that returns from C++. It may
    be compiling, or waiting in a collective or for another node.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = {one: signal.signal(one, _heard) for one in heeded()}
    _handled.update(before)
    earlier = signal.set_wakeup_fd(writer.fileno())
    thread = threading.Thread(target=_listen, args=(reader, end), daemon=True)
    thread.start()
    try:
        yield
    finally:
        _handled.clear()
        signal.set_wakeup_fd(earlier)
        for one, handler in before.items():
            signal.signal(one, handler)
        writer.close()
        thread.join()
        reader.close()


def _leave_to_parent() -> None:
    """Let signals kill a forked child, for example a worker of a data set; they end no run."""
    if _handled:
        with contextlib.suppress(ValueError):  # forked by another thread than the main one
            signal.set_wakeup_fd(-1)
            for one in _handled:
                signal.signal(one, signal.SIG_DFL)


os.register_at_fork(after_in_child=_leave_to_parent)


def _heard(number: int, frame: FrameType | None) -> None:
    """Do nothing: the file descriptor has already notified the thread."""


def _listen(reader: socket.socket, end: Callable[[signal.Signals], None]) -> None:
    ending: threading.Thread | None = None
    begun = 0.0
    while told := reader.recv(1):
        if told[0] not in ENDING:
            continue
        number = signal.Signals(told[0])
        if ending is None:
            begun = time.monotonic()
            ending = threading.Thread(target=end, args=(number,), daemon=True)
            ending.start()
        elif time.monotonic() - begun > _SAME:
            die_of(number)
    if ending is not None:  # the main thread came to its own end meanwhile
        ending.join()


def die_of(number: signal.Signals) -> NoReturn:
    """End this process by a signal, which its launcher then sees, from any thread."""
    ctypes.CDLL(None).signal(number, None)  # Python sets handlers in the main thread alone
    os.kill(os.getpid(), number)
    os._exit(128 + number)  # where the signal is blocked
