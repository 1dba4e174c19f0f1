"""Job like that of ``./run_train.sh``, forked from a process that has done the imports.

It serves tests of later behaviour, because an own start costs a process four CPU seconds.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection
from typing import NoReturn

from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

from tests.support.rank_pool import forkserver, sleep_unless_the_trainer_asks


class ForkedJob:
    """Part of ``subprocess.Popen`` that the tests use.

    Args:
        arguments: command line of ``train``.
        env: the whole environment.
        warm_ranks: number of ranks to fork as well; the launcher starts others as a user's.
        network: network namespace of the job.
        terminal: controlling terminal of the job, instead of pipes.
        nohup: ignore SIGHUP from the start.
    """

    def __init__(
        self,
        arguments: list[str],
        env: dict[str, str],
        *,
        warm_ranks: int = 0,
        network: str = "",
        terminal: str = "",
        nohup: bool = False,
    ) -> None:
        self.returncode: int | None = None
        context = forkserver()
        out, out_of_child = context.Pipe(duplex=False)
        err, err_of_child = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_train,
            args=(arguments, env, out_of_child, err_of_child, warm_ranks, network, terminal, nohup),
            daemon=True,
        )
        self._process.start()
        for ours in (out_of_child, err_of_child):
            ours.close()
        self.stdout, self.stderr = (os.fdopen(os.dup(end.fileno())) for end in (out, err))
        self.pid = self._process.pid

    def send_signal(self, number: signal.Signals) -> None:
        assert self.pid is not None
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Wait for the end and return the rest of both streams; kill the job after ``timeout``."""
        limit = threading.Timer(timeout, self._process.kill)
        limit.start()
        with self.stdout, self.stderr:
            said = self.stdout.read(), self.stderr.read()
        self._process.join()
        limit.cancel()
        self.returncode = self._process.exitcode
        return said


def _train(
    arguments: list[str],
    env: dict[str, str],
    out: Connection,
    err: Connection,
    warm_ranks: int,
    network: str,
    terminal: str,
    nohup: bool,
) -> None:
    os.environ.clear()
    os.environ.update(env)
    if nohup:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if network:
        with open(f"/run/netns/{network}") as namespace:
            assert ctypes.CDLL(None).setns(namespace.fileno(), 0) == 0
    ends = [out.fileno(), err.fileno()]
    if terminal:
        os.setsid()  # the leader of a session gets the terminal that it opens first
        ends = [os.open(terminal, os.O_RDWR)] * 2
    for stream, end in zip((sys.stdout, sys.stderr), ends, strict=True):
        os.dup2(end, stream.fileno())
    out.close()
    err.close()
    if warm_ranks:
        _WarmRank.spares = [_spare() for _ in range(warm_ranks)]
        subprocess_handler.Popen = _WarmRank  # type: ignore[misc]
    from titan_moe_lb import cli

    cli.main(["train", *arguments])


class _WarmRank(subprocess.Popen):
    """Rank as torch's agent starts it, in a child that was forked before the agent has threads."""

    spares: list[tuple[int, Connection]]

    def __init__(self, args: tuple[str, ...], *, env: dict[str, str], **_more: object) -> None:
        self._environment = env
        super().__init__(args)

    def _execute_child(self, args: tuple[str, ...], *_more: object) -> None:
        self.pid, connection = self.spares.pop()
        self._child_created = True
        connection.send((args[args.index("titan_moe_lb.run.train") + 1 :], self._environment))


def _spare() -> tuple[int, Connection]:
    """Fork a child; return its process id, and the socket at which it waits for arguments."""
    ours, theirs = multiprocessing.Pipe()
    if process_id := os.fork():
        theirs.close()
        return process_id, ours
    ours.close()
    _be_a_rank(theirs)


def _be_a_rank(launcher: Connection) -> NoReturn:
    status = 1
    try:
        arguments, environment = launcher.recv()
        os.setsid()
        os.environ.clear()
        os.environ.update(environment)
        # Workers of a data loader are started as in a process that multiprocessing has not made.
        multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
        multiprocessing.set_start_method(None, force=True)
        time.sleep = sleep_unless_the_trainer_asks
        from titan_moe_lb.run import parent_process, train
        from titan_moe_lb.upstream import cpu

        parent_process.end_with_launcher(or_agent=True)
        train.main(list(arguments))
        cpu.leave()
    except SystemExit as stop:
        status = stop.code
    finally:
        os._exit(status)
