"""Jobs in their own processes, their output, and their remaining processes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.support.forked_job import ForkedJob

TINY = ["--module=deepseek_v3", "--config=deepseek_v3_tiny", "--metrics.log_freq=1"]
JOB_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "NGPU",
    "NNODES",
    "LOG_RANK",
    "MODULE",
    "CONFIG",
    "COMM_MODE",
)
Job = subprocess.Popen | ForkedJob


def start(folder: Path, *flags: str, **variables: str) -> Job:
    """Start a job as a user does, with these variables in its environment."""
    train = [sys.executable, "-m", "titan_moe_lb.cli", "train"]
    return run([*train, *flags, f"--dump_folder={folder}"], **variables)


def run(command: list[str], **variables: str) -> subprocess.Popen:
    """Start a program with its output in pipes."""
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, env=environment(**variables), stdout=pipe, stderr=pipe, text=True
    )


def fork(
    folder: Path,
    *flags: str,
    warm_ranks: int | None = None,
    network: str = "",
    terminal: str = "",
    nohup: bool = False,
    **variables: str,
) -> ForkedJob:
    """Start a job by forking, for tests that are not about the start; see :class:`ForkedJob`.

    Args:
        warm_ranks: number of ranks to fork; default: all that the launcher starts once.
    """
    return ForkedJob(
        [*flags, f"--dump_folder={folder}"],
        environment(**variables),
        warm_ranks=int(variables.get("NGPU", 0)) if warm_ranks is None else warm_ranks,
        network=network,
        terminal=terminal,
        nohup=nohup,
    )


def environment(**variables: str) -> dict[str, str]:
    """Environment of this process without the variables of a job, plus these."""
    clean = {name: value for name, value in os.environ.items() if name not in JOB_VARIABLES}
    return {**clean, "OMP_NUM_THREADS": "1", **variables}


def read_to(job: Job, text: str) -> list[str]:
    """Read the lines up to the first one that contains the text."""
    lines = []
    for line in job.stdout:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError(f"no {text!r} in {''.join(lines)}{job.stderr.read()}")


def end(job: Job, folder: Path) -> tuple[int, list[str], str]:
    """Wait for the end; return status, standard output and standard error; no process is left."""
    out, err = job.communicate(timeout=120)
    assert working_in(folder) == []
    return job.returncode, out.splitlines(), err


def working_in(path: Path) -> list[psutil.Process]:
    """List the processes that have this file, or a file of this folder, open."""
    found = []
    for one in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(Path(file.path).is_relative_to(path) for file in one.open_files()):
                found.append(one)
    return found


def until(holds: Callable[[], object], seconds: float = 60) -> None:
    """Wait for a condition that no process reports."""
    due = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < due
        time.sleep(0.02)


def last_step(line: str) -> int:
    """Read the last saved step of the trace from the last line of a run."""
    return int(line.partition("trace up to step ")[2].split()[0])
