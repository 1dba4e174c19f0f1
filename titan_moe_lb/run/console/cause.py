"""Cause of a failed run, in one line.

The line names a remedy for a mistake in the job, a full disk or too little memory. For any other
error it names the type, and the log contains the traceback.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.elastic.multiprocessing.errors import (
    ChildFailedError,
    ProcessFailure,
)

from titan_moe_lb.checkpoints.resume_point import own_folder, remedy
from titan_moe_lb.errors import JobError
from titan_moe_lb.resolved_job import Job

_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_ROOM = 2**20
"""Free bytes below which a failed save means a full disk; torch's writer gives no reason."""
_NO_MEMORY = ("can't allocate memory", "out of memory")
_PEER_IS_GONE = ("gloo", "nccl", "Connection closed by peer", "Connection reset by peer")


@dataclass(frozen=True, kw_only=True)
class Cause:
    """Cause of a failure in one line, and the exit status."""

    line: str
    status: int = 1
    """Exit status: 2 if the job cannot run as written, 1 if it ran and failed."""
    has_traceback: bool = True
    is_echo: bool = False
    """This process failed because another one did; the cause is there."""

    def sentence(self, saved: object, log: Path) -> str:
        """Return the cause, what was saved, and the log with the traceback."""
        parts = [self.line]
        if self.status != 2:
            parts.append(f"saved: {saved}")
        if self.has_traceback:
            parts.append(f"traceback: {log}")
        return "; ".join(parts)


def of_error(error: BaseException, job: Job, *, at_start: bool) -> Cause:
    """Return the cause of an exception.

    ``at_start``: no step was trained yet, so that a checkpoint that fails was being loaded.
    """
    if isinstance(error, JobError):
        return Cause(line=str(error), status=2, has_traceback=False)
    config, chain = job.config, list(_chain(error))
    for one in chain:
        if isinstance(one, OSError) and one.errno in _FULL:
            return _full(config.dump_folder, one.filename)
    text = " ".join(str(error).split())
    if any(isinstance(one, (MemoryError, torch.OutOfMemoryError)) for one in chain) or any(
        words in text for words in _NO_MEMORY
    ):
        return Cause(
            line=f"out of memory ({_short(error)}): reduce training.local_batch_size or "
            "training.seq_len, or use more ranks or activation checkpointing"
        )
    if isinstance(error, CheckpointException) or "PytorchStreamWriter" in text:
        if not at_start and _free(config.dump_folder) < _NO_ROOM:
            return _full(config.dump_folder, None)
        start = job.start if at_start else None
        if start is not None:
            reason = str(chain[-1]) if isinstance(chain[-1], JobError) else _short(chain[-1])
            line = f"{start.path} cannot be loaded ({reason}); "
            line += remedy(own_folder(config), start.path)
            return Cause(line=line, status=2)
        return Cause(line=f"a checkpoint failed ({_short(chain[-1])})")
    if isinstance(error, OSError) and error.filename is not None:
        return Cause(line=f"{os.fspath(error.filename)}: {error.strerror}")
    lost = isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(words in text for words in _PEER_IS_GONE)
    )
    line = f"lost the connection to another process ({_short(error)})" if lost else _short(error)
    return Cause(line=line, is_echo=lost)


def _full(folder: str, file: str | None) -> Cause:
    return Cause(
        line=f"the disk of {file or folder} is full: free some space, or name another "
        "folder with --dump_folder"
    )


def _free(folder: str) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return _NO_ROOM


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield the exception and what led to it; for a checkpoint, the failure of its first rank."""
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        if isinstance(one, CheckpointException):
            one = next(iter(one.failures.values()))[0]
        else:
            one = one.__cause__ or one.__context__


def _short(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    text = text if len(text) <= 200 else f"{text[:200]}..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def tell_launcher(cause: Cause) -> bool:
    """Write the cause to the error file that the launcher reads; return False without one."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        return False
    message = {
        "message": cause.line,
        "extraInfo": {"py_callstack": cause.line, "timestamp": str(int(time.time()))},
    }
    ours = dataclasses.asdict(cause) | {"time": time.time()}
    Path(file).write_text(json.dumps({"message": message, "titan_moe_lb": ours}))
    return True


def of_processes(error: ChildFailedError, logs: Path) -> tuple[Cause, Path]:
    """Find the process that failed first and so made the others fail."""
    rank, failure = min(error.failures.items(), key=lambda item: _order(item[1]))
    log = logs / f"rank{rank}.log"
    ours = failure.error_file_data.get("titan_moe_lb")
    if failure.exitcode < 0:
        name = failure.signal_name()
        hint = ", probably out of memory" if name == "SIGKILL" else ""
        line = f"rank {rank} was killed by {name}{hint}; its log: {log}"
        is_echo = failure.exitcode == -signal.SIGABRT
        cause = Cause(line=line, has_traceback=False, is_echo=is_echo)
    elif ours is None:
        line = f"rank {rank} ended with status {failure.exitcode} without an error message: see {log} and "
        line += str(logs / "launcher.log")
        cause = Cause(line=line, has_traceback=False)
    else:
        words = failure.error_file_data["message"]["message"]
        cause = Cause(
            line=words if ours["status"] == 2 else f"rank {rank}: {words}",
            status=ours["status"],
            has_traceback=ours["has_traceback"],
            is_echo=ours["is_echo"],
        )
    return cause, log


def _order(failure: ProcessFailure) -> tuple[int, float]:
    """Sort key: processes that failed by themselves, then those that failed because of them."""
    ours = failure.error_file_data.get("titan_moe_lb")
    if ours is not None:
        return (3 if ours["is_echo"] else 1), ours["time"]
    if failure.exitcode == -signal.SIGTERM:  # the launcher sent it
        return 4, failure.timestamp
    if failure.exitcode == -signal.SIGABRT:  # NCCL raises it when a peer does not answer
        return 2, failure.timestamp
    return (0 if failure.exitcode < 0 else 1), failure.timestamp
