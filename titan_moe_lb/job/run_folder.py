"""The folder that a run writes to: it can be written, and no other run is at work in it."""

from __future__ import annotations

import fcntl
import os
import tempfile

from torchtitan.tools import filesystem

from titan_moe_lb.errors import JobError


def claim(folder: str, nodes: int) -> None:
    """Make ``dump_folder`` and keep it for the run of this process, until the process ends.

    Only of a run on one node: the others of a run share the folder, and may share the lock.

    Raises:
        JobError: nothing can be written there, or another run holds it.
    """
    if not folder:
        raise JobError("dump_folder is empty: name a folder, as in --dump_folder ./outputs")
    if filesystem.is_remote(folder):
        return
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
        directory = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise JobError(
            f"dump_folder {folder} cannot be written ({error.strerror}): "
            "name another with --dump_folder"
        ) from None
    if nodes == 1:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(directory)
            raise JobError(
                f"dump_folder {folder} is that of a run at work: give this run another with "
                "--dump_folder"
            ) from None
        except OSError:  # a file system without locks
            os.close(directory)
