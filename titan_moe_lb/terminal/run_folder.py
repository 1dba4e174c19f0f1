"""Output folder of a run: checks and a lock against other runs."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import tempfile
import time

from titan_moe_lb.errors import JobError

_LOCK = ".run.lock"
_TRIES = 20


def is_remote(folder: str) -> bool:
    """Return True if torch and torchtitan access the folder through fsspec, as ``s3://bucket``."""
    return "://" in folder


def claim(folder: str, run: str, *, name: str = "dump_folder", kind: str = "run") -> None:
    """Make a folder and lock it for a run until this process ends.

    The launcher and all ranks of a run share the lock. A remote folder is left as it is, and a
    file system without locks is not locked. ``name`` is the user's key of the folder, and the
    flag.

    Raises:
        JobError: the folder has no name, is not writable, or is locked by another run.
    """
    lock = _open(folder, name)
    if lock is None:
        return
    try:
        held_by = _hold(lock, run.encode())
    except OSError:  # a file system without locks
        os.close(lock)
        return
    if held_by != run.encode():
        os.close(lock)
        raise _in_use(folder, name, kind)
    # A forked data-loader worker may outlive this process by seconds; it must not hold the lock.
    os.register_at_fork(after_in_child=functools.partial(os.close, lock))


def check_free(folder: str) -> None:
    """Make the ``dump_folder`` of a run whose nodes have not met yet, and check that no run has it.

    Raises:
        JobError: the folder has no name, is not writable, or is locked by a run.
    """
    lock = _open(folder, "dump_folder")
    if lock is None:
        return
    try:
        for _ in range(_TRIES):
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            time.sleep(0.05)  # another node may look at the same moment
        raise _in_use(folder, "dump_folder", "run")
    except OSError:  # a file system without locks
        return
    finally:
        os.close(lock)


def _open(folder: str, name: str) -> int | None:
    """Make a folder and open its lock; return None for a remote one."""
    if not folder:
        raise JobError(f"{name} is empty: name a folder, as in --{name} ./outputs")
    if is_remote(folder):
        return None
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
        return os.open(os.path.join(folder, _LOCK), os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise JobError(
            f"{name} {folder} cannot be written ({error.strerror}): name another with --{name}"
        ) from None


def _in_use(folder: str, name: str, kind: str) -> JobError:
    return JobError(
        f"{name} {folder} is in use by another {kind}: name another folder with --{name}"
    )


def _hold(lock: int, run: bytes) -> bytes:
    """Acquire the lock if it is free; return the name of the run that holds it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.truncate(lock, 0)
        os.pwrite(lock, run, 0)
    except BlockingIOError:
        pass
    # The writer holds an exclusive lock, so readers never see a partial name.
    fcntl.flock(lock, fcntl.LOCK_SH)
    return os.pread(lock, 4096, 0)
