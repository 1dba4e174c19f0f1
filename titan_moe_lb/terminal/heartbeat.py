"""Progress lines while a command has no other output."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Heartbeat:
    """Context manager that prints a line after some seconds, and again whenever the time doubles.

    Args:
        say: print function.
        what: returns the line for the seconds since the start; called in another thread.
        after: seconds until the first line.
    """

    def __init__(
        self, say: Callable[[str], None], what: Callable[[int], str], after: float = 15
    ) -> None:
        self._say, self._what, self._after = say, what, after
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._wait, daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.end()

    def end(self) -> None:
        """Print no more lines."""
        self._over.set()

    def _wait(self) -> None:
        start, due = time.monotonic(), self._after
        while not self._over.wait(start + due - time.monotonic()):
            line = self._what(round(due))
            if not self._over.is_set():
                self._say(line)
            due *= 2
