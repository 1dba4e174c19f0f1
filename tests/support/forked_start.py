"""A run like that of ``./run_train.sh``, but forked from a process that has done the imports.

For what happens after them: a start of its own costs four CPU seconds before the first line.
Ranks that a launcher starts are processes of their own all the same.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from multiprocessing.connection import Connection

from tests.support.rank_pool import forkserver


class ForkedStart:
    """What the tests use of ``subprocess.Popen``."""

    def __init__(self, args: list[str], env: dict[str, str]) -> None:
        self.args = args
        self.returncode: int | None = None
        context = forkserver()
        out, out_of_child = context.Pipe(duplex=False)
        err, err_of_child = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_train, args=(args, env, out_of_child, err_of_child), daemon=True
        )
        self._process.start()
        for ours in (out_of_child, err_of_child):
            ours.close()
        self.stdout, self.stderr = (os.fdopen(os.dup(end.fileno())) for end in (out, err))
        self.pid = self._process.pid

    def send_signal(self, number: signal.Signals) -> None:
        assert self.pid is not None
        os.kill(self.pid, number)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """The rest of both streams, after the end. What takes longer than ``timeout`` is killed."""
        limit = threading.Timer(timeout, self._process.kill)
        limit.start()
        with self.stdout, self.stderr:
            said = self.stdout.read(), self.stderr.read()
        self._process.join()
        limit.cancel()
        self.returncode = self._process.exitcode
        return said


def _train(args: list[str], env: dict[str, str], out: Connection, err: Connection) -> None:
    os.environ.clear()
    os.environ.update(env)
    for stream, end in (sys.stdout, out), (sys.stderr, err):
        os.dup2(end.fileno(), stream.fileno())
        end.close()
    from titan_moe_lb import cli

    cli.main(["train", *args])
