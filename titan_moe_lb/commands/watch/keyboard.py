"""Single keys from the terminal, which is put back as it was however the program ends."""

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
    """Keys as they are pressed; none where the standard input is not a terminal."""

    def __init__(self, file: int | None) -> None:
        self._file = file
        self.is_there = file is not None

    def pressed(self, seconds: float) -> str:
        """The keys of the next ``seconds``, at the first of them; empty if there were none."""
        if self._file is None:
            time.sleep(seconds)
            return ""
        if not select.select([self._file], [], [], seconds)[0]:
            return ""
        keys = os.read(self._file, 64).decode(errors="replace")
        if not keys:  # the input has ended
            self._file = None
        return keys


@contextmanager
def keyboard() -> Iterator[Keyboard]:
    """Keys without the return key and without an echo; Ctrl-C still interrupts.

    A signal that would end the program at once first leaves every ``with``, then ends it with
    status 128 + its number.
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
