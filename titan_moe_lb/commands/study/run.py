"""Runner of a study's cells, several at once."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Literal

import numpy as np
import psutil

from titan_moe_lb.commands.study.cell import CellFolder, Record
from titan_moe_lb.errors import JobError
from titan_moe_lb.run import parent_process
from titan_moe_lb.traces.trace import read_trace

_STOP_SECONDS = 30
_NOT_FINITE = "Loss is not finite"
"""Message of torchtitan 0.3.0 for a loss that is not finite."""


class Runner:
    """Runner of cells, each as a training job in its own processes."""

    def __init__(self, processes: int, threads: int) -> None:
        """Store how many cells run at once, and the threads of each of their processes."""
        self._processes = processes
        self._threads = threads
        self._running: dict[Path, subprocess.Popen] = {}
        self._lock = threading.Lock()
        self._stopped = False

    def run(
        self,
        folders: Iterator[CellFolder],
        *,
        began: Callable[[CellFolder], None],
        ended: Callable[[CellFolder, Record], None],
    ) -> None:
        """Run each cell to its end.

        The next folder is read when a slot is free, so that a sampler knows earlier results. An
        error stops all running cells. ``began`` is called before a cell starts, ``ended`` with the
        record of one that has ended.

        Raises:
            JobError: the log or record of a cell cannot be written.
        """
        with ThreadPoolExecutor(self._processes) as pool:
            pending: dict[Future[Record], CellFolder] = {}
            try:
                while True:
                    while len(pending) < self._processes:
                        folder = next(folders, None)
                        if folder is None:
                            break
                        began(folder)
                        pending[pool.submit(self._run_cell, folder)] = folder
                    if not pending:
                        return
                    done, _others = wait(pending, return_when=FIRST_COMPLETED)
                    for future in done:
                        folder = pending.pop(future)
                        ended(folder, future.result())
            except BaseException:
                self._stop()
                raise

    def _run_cell(self, folder: CellFolder) -> Record:
        try:
            folder.clear()
            with open(folder.log, "wb") as log:
                begun = time.monotonic()
                status = self._train(folder, log)
        except OSError as error:
            raise folder.unwritable(error) from None
        if self._stopped:
            raise JobError("the study was stopped")
        error = _last_line(folder.log) if status else ""
        record = Record(
            **dataclasses.asdict(folder.cell),
            status=_status(folder.path, error),
            seconds=round(time.monotonic() - begun, 1),
            error=error,
        )
        folder.write(record)
        return record

    def _train(self, folder: CellFolder, log) -> int:
        """Run the cell in its own session, out of reach of Ctrl-C, and return its exit status."""
        with self._lock:
            if self._stopped:
                return 1
            process = subprocess.Popen(
                command(folder),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={
                    **os.environ,
                    **parent_process.launcher_environment(),
                    "NGPU": str(folder.cell.ranks),
                    "OMP_NUM_THREADS": str(self._threads),
                },
            )
            self._running[folder.path] = process
        try:
            return process.wait()
        finally:
            with self._lock:
                self._running.pop(folder.path)

    def _stop(self) -> None:
        with self._lock:
            self._stopped = True
            running = list(self._running.values())
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        for process in running:
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def command(folder: CellFolder) -> list[str]:
    """Build the command line of a cell, as a user would type it."""
    train = [sys.executable, "-m", "titan_moe_lb.cli", "train"]
    return [*train, *folder.cell.flags, f"--dump_folder={folder.path}"]


def stop_leftovers(cells: Path) -> None:
    """Kill processes of an earlier, killed study, which would still write into its cells.

    Raises:
        JobError: such a process belongs to another user.
    """
    flag = f"--dump_folder={cells}{os.sep}"
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(word.startswith(flag) for word in process.info["cmdline"] or ()):
            try:
                process.kill()
                found.append(process)
            except psutil.NoSuchProcess:
                pass
            except psutil.AccessDenied:
                raise JobError(
                    f"process {process.pid}, of another user, trains a cell in {cells}: wait for it, "
                    "or name another folder with --output"
                ) from None
    psutil.wait_procs(found, timeout=_STOP_SECONDS)


def _status(path: Path, error: str) -> Literal["done", "diverged", "failed"]:
    """Status of an ended run, from its error, else from the last loss in its trace."""
    if error:
        return "diverged" if _NOT_FINITE in error else "failed"
    try:
        loss_S = read_trace(path).step_columns.get("loss", np.zeros(1))
    except JobError:  # the job wrote no trace
        return "failed"
    return "done" if np.isfinite(loss_S[-1]) else "diverged"


def _last_line(log: Path) -> str:
    """Last error of a failed cell, else its last line."""
    lines = log.read_text(errors="replace").strip().splitlines()
    errors = [line for line in lines if line.startswith("titan_moe_lb: error: ")] or lines
    return errors[-1].removeprefix("titan_moe_lb: error: ") if errors else "it printed nothing"
