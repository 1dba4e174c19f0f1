"""Guard against forbidden actions while a file is read, by Python's audit events.

Source: https://docs.python.org/3/library/audit_events.html
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {
    **dict.fromkeys(("os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.truncate"), 0),
    **dict.fromkeys(("os.rename", "os.symlink", "os.link"), 1),
}
"""Index of the changed path among the arguments of an event."""
_NEVER = (
    *("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork"),
    *("socket.connect", "socket.bind", "socket.getaddrinfo"),
)
_PICKLE = "pickle.find_class"


class Hang(BaseException):
    """A case took too long."""


class Guard:
    """Context manager that raises ``AssertionError`` at its end for each forbidden action.

    Use ``with Guard().watch(folder): ...``. A process needs one guard, because an audit hook cannot
    be removed.
    """

    def __init__(self) -> None:
        self._folder: str | None = None
        self._may_unpickle = False
        self._seen: list[str] = []
        sys.addaudithook(self._hear)

    @contextlib.contextmanager
    def watch(self, folder: Path, *, seconds: float, may_unpickle: bool) -> Iterator[None]:
        """Watch the process.

        Args:
            folder: folder in which files may be written.
            seconds: time after which ``Hang`` is raised, in the main thread.
            may_unpickle: True for a checkpoint, whose metadata is a pickle.
        """
        before = sys.dont_write_bytecode, signal.signal(signal.SIGALRM, _too_long)
        sys.dont_write_bytecode = True
        self._seen.clear()
        self._may_unpickle = may_unpickle
        self._folder = str(folder.resolve())
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self._folder = None
            sys.dont_write_bytecode = before[0]
            signal.signal(signal.SIGALRM, before[1])
        assert not self._seen, self._seen

    def _hear(self, event: str, details: tuple) -> None:
        if self._folder is None:
            return
        if event in _NEVER or (event == _PICKLE and not self._may_unpickle):
            self._seen.append(f"{event} {details}")
        elif event == "open" and isinstance(details[0], (str, bytes)):
            if details[2] & _WRITES:
                self._written(event, details[0])
        elif event in _CHANGES:
            self._written(event, details[_CHANGES[event]])

    def _written(self, event: str, path: str | bytes | int) -> None:
        if isinstance(path, int):
            return
        where = os.path.abspath(os.fsdecode(path))
        if where != os.devnull and not where.startswith(f"{self._folder}{os.sep}"):
            self._seen.append(f"{event} {where}")


def _too_long(number: int, frame: FrameType | None) -> None:
    raise Hang
