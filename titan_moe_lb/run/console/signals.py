"""A signal that ends the process at once, also while it is deep in C++."""

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
    """Those that are not ignored: ``nohup`` lets a run ignore SIGHUP."""
    return [one for one in ENDING if signal.getsignal(one) != signal.SIG_IGN]


@contextlib.contextmanager
def ended_by(end: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Call ``end`` in a thread of its own when one of :func:`heeded` arrives.

    Python's own handlers run in the main thread, and only when that comes back from C++:
    after a compilation, a collective that waits for a rank, or nodes that wait for a node.
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
    """The thread has been told by the file descriptor already."""


def _listen(reader: socket.socket, end: Callable[[signal.Signals], None]) -> None:
    while True:
        select.select([reader], [], [])
        told = reader.recv(1)
        if not told:
            return
        if told[0] in ENDING:
            end(signal.Signals(told[0]))
