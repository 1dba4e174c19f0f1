"""Signal handling that ends a process at once, even while its main thread is in C++."""

from __future__ import annotations

import contextlib
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def heeded() -> list[signal.Signals]:
    """Return the signals of ``ENDING`` that are not ignored; ``nohup`` ignores SIGHUP."""
    return [one for one in ENDING if signal.getsignal(one) != signal.SIG_IGN]


@contextlib.contextmanager
def ended_by(end: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Call ``end`` in a separate thread when one of :func:`heeded` arrives.

    Python runs its handlers in the main thread, and only after that returns from C++. It may
    be compiling, or waiting in a collective or for another node.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = {one: signal.signal(one, _heard) for one in heeded()}
    earlier = signal.set_wakeup_fd(writer.fileno())
    thread = threading.Thread(target=_listen, args=(reader, end), daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(earlier)
        for one, handler in before.items():
            signal.signal(one, handler)
        writer.close()
        thread.join()
        reader.close()


def _heard(number: int, frame: FrameType | None) -> None:
    """Do nothing: the file descriptor has already notified the thread."""


def _listen(reader: socket.socket, end: Callable[[signal.Signals], None]) -> None:
    while True:
        select.select([reader], [], [])
        told = reader.recv(1)
        if not told:
            return
        if told[0] in ENDING:
            end(signal.Signals(told[0]))
