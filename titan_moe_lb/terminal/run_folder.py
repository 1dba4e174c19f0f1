"""The folder that a run writes to: it can be written, and no other run is at work in it."""

from __future__ import annotations

import fcntl
import functools
import os
import tempfile

from torchtitan.tools import filesystem

from titan_moe_lb.errors import JobError

_LOCK = ".run.lock"


def claim(folder: str, run: str, *, name: str = "dump_folder", kind: str = "run") -> None:
    """Make ``dump_folder`` and keep it for a run until this process ends.

    The launcher and every rank of a run do so: it is taken as long as one of them lives.

    Args:
        run: what the processes have in common that may share the folder: those of one run.
        name: of the user's own key, which is a flag too.
        kind: of what is at work there.

    Raises:
        JobError: nothing can be written there, or another run holds it.
    """
    if not folder:
        raise JobError(f"{name} is empty: name a folder, as in --{name} ./outputs")
    if filesystem.is_remote(folder):
        return
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
        lock = os.open(os.path.join(folder, _LOCK), os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise JobError(
            f"{name} {folder} cannot be written ({error.strerror}): name another with --{name}"
        ) from None
    try:
        held_by = _hold(lock, run.encode())
    except OSError:  # a file system without locks
        os.close(lock)
        return
    if held_by != run.encode():
        os.close(lock)
        raise JobError(
            f"{name} {folder} is that of a {kind} at work: give this {kind} another with --{name}"
        )
    # A forked worker of a data loader may live on for seconds.
    os.register_at_fork(after_in_child=functools.partial(os.close, lock))


def _hold(lock: int, run: bytes) -> bytes:
    """Whose lock it is: ours if nobody held it, else that of who came first."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.truncate(lock, 0)
        os.pwrite(lock, run, 0)
    except BlockingIOError:
        pass
    # Who writes the name holds the lock alone; who waits here reads a name that is whole.
    fcntl.flock(lock, fcntl.LOCK_SH)
    return os.pread(lock, 4096, 0)
