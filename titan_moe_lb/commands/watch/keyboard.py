"""Single keys from the terminal, whose settings are restored however the program ends."""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager

_ENDING = (signal.SIGTERM, signal.SIGHUP)


class Keyboard:
    """Reader of single keys; it reads none if the standard input is no terminal."""

    def __init__(self, file: int | None) -> None:
        self._file = file
        self.is_there = file is not None

    def pressed(self, seconds: float) -> str:
        """Return pressed keys, after a wait of at most ``seconds`` for the first; may be empty."""
        if self._file is None:
            time.sleep(seconds)
            return ""
        waiting = select.poll()  # select() takes no file beyond the 1,024th
        waiting.register(self._file, select.POLLIN)
        if not waiting.poll(1000 * seconds):
            return ""
        keys = os.read(self._file, 64).decode(errors="replace")
        if not keys:  # the input has ended
            self._file = None
        return keys


@contextmanager
def keyboard() -> Iterator[Keyboard]:
    """Switch the terminal to single keys without echo; Ctrl-C still interrupts.

    SIGTERM and SIGHUP raise SystemExit with status 128 + their number, so that every ``with``
    block is left first.
    """

    def leave(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in _ENDING}
    file = sys.stdin.fileno() if sys.stdin is not None and sys.stdin.isatty() else None
    settings = None if file is None else termios.tcgetattr(file)
    try:
        if file is not None:
            tty.setcbreak(file)
        yield Keyboard(file)
    finally:
        if file is not None and settings is not None:
            termios.tcsetattr(file, termios.TCSADRAIN, settings)
        for number, handler in before.items():
            signal.signal(number, handler)
