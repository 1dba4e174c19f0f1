"""Processes of a job on this node: torchrun's agent with our own console."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, TextIO

from torch.distributed import DistError, TCPStore
from torch.distributed.elastic.multiprocessing import (
    DefaultLogsSpecs,
    LogsDest,
    SignalException,
)
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from titan_moe_lb import rules
from titan_moe_lb.errors import JobError
from titan_moe_lb.resolved_job import Job
from titan_moe_lb.run import environment, train
from titan_moe_lb.run.console import cause, rank_log, summary
from titan_moe_lb.run.console.peers import Peers
from titan_moe_lb.run.console.saved import Saved
from titan_moe_lb.run.console.signals import ENDING, ended_by, heeded
from titan_moe_lb.terminal import run_folder
from titan_moe_lb.terminal.heartbeat import Heartbeat


def run(
    job: Job, arguments: list[str], name: str, here: int, nodes: int, max_restarts: int = 0
) -> None:
    """Train in the processes of this node.

    ``name`` is of the run, and no other launcher has it. ``max_restarts`` is how often all
    processes restart from the last checkpoint, after one was killed or failed for another reason
    than a mistake in the job.
    """
    saved = Saved(job.config)
    logs = rank_log.folder_of(job.config.dump_folder)
    console = rank_log.divert_errors(logs / "launcher.log")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if nodes > 1:
        environment.choose_network()
    where = f" of {here * nodes} on {nodes} nodes" if nodes > 1 else ""
    print(f"starting {here} process{'es' if here > 1 else ''}{where}", flush=True)
    handlers = {number: signal.getsignal(number) for number in ENDING}
    attempt = _Attempt(job, arguments, name, here, nodes, saved, console)
    for restart in range(1, max_restarts + 1):
        if attempt.succeeds(f"; starting again ({restart} of {max_restarts})"):
            return
        for number, handler in handlers.items():  # torch does not restore them
            signal.signal(number, handler)
        try:
            rules.validate_here(Job.of(job.config, job.layout.world_size))
        except JobError as error:
            rank_log.report(f"error: {error}", console)
            raise SystemExit(2) from None
    attempt.succeeds()


@dataclass(frozen=True)
class _Attempt:
    """One start of the job's processes."""

    job: Job
    arguments: list[str]
    name: str
    here: int
    nodes: int
    saved: Saved
    console: TextIO

    def succeeds(self, again: str = "") -> bool:
        """Run the processes until they end.

        ``again`` ends the message about a failure after which the job may restart; it is empty if
        no restart is left.

        Returns:
            True after success; False after a failure after which the job may restart.

        Raises:
            SystemExit: any other end, with its status.
        """
        config, nodes = self.job.config, self.nodes
        logs = rank_log.folder_of(config.dump_folder)
        shown = summary.ranks_shown(self.job)
        with (
            tempfile.TemporaryDirectory(prefix="titan_moe_lb-") as errors,
            _Meeting(self.console, nodes) as meeting,
            Peers(lambda: os.kill(os.getpid(), signal.SIGTERM)) as peers,
        ):

            def met(processes: list[dict[str, str]]) -> None:
                meeting.close()
                if nodes == 1:
                    environment.hand_on_run(self.name)
                    return
                name = peers.meet(processes[0], self.name)
                run_folder.claim(config.dump_folder, name)
                environment.hand_on_run(name)
                ranks = [int(one["RANK"]) for one in processes]
                if not set(shown) & set(ranks):
                    print(
                        f"this node runs ranks {ranks[0]} to {ranks[-1]}; the node of rank {shown[0]} shows "
                        f"the steps; logs: {logs}",
                        flush=True,
                    )

            launch = elastic_launch(
                LaunchConfig(
                    min_nodes=nodes,
                    max_nodes=nodes,
                    nproc_per_node=self.here,
                    run_id=environment.meeting_id(config.dump_folder),
                    role="rank",
                    max_restarts=0,
                    shutdown_timeout=train.CLOSING_SECONDS + 3,
                    signals_to_handle=",".join(one.name for one in (*heeded(), signal.SIGQUIT)),
                    logs_specs=_Logs(errors, met),
                    **_rendezvous(nodes),
                ),
                sys.executable,
            )
            told: cause.Cause | None = None
            try:
                launch("-u", "-m", "titan_moe_lb.run.train", *self.arguments)
                return True
            except ChildFailedError as error:
                if not again:
                    _ignore_signals()
                found, log = cause.of_processes(error, logs)
                told = (peers.blame() if found.is_echo else None) or found
                line = f"error: {told.sentence(self.saved, log)}"
                status = told.status
                if again and status == 1:
                    rank_log.report(f"{line}{again}", self.console)
                    return False
            except SignalException as error:
                _ignore_signals()
                number = signal.Signals(error.sigval)
                if peers.loss is None:
                    line = train.stopped(number, self.saved)
                    status = 128 + number
                    told = cause.Cause(line=f"stopped by {number.name}", has_traceback=False)
                else:
                    told = peers.loss
                    line = f"error: {told.sentence(self.saved, logs)}"
                    status = told.status
            except (RendezvousError, DistError):
                traceback.print_exc()
                line = f"error: {meeting.failed()}"
                status = 1
            except KeyboardInterrupt:  # after the rendezvous, before torch sets its handlers
                line = train.stopped(signal.SIGINT, self.saved)
                status = 128 + signal.SIGINT
            except Exception as error:
                traceback.print_exc()
                told = cause.of_error(error, self.job, at_start=True)
                line = f"error: {told.sentence('nothing', logs / 'launcher.log')}"
                status = told.status
            rank_log.report(line, self.console)
            if told is not None:
                peers.tell(told)
        raise SystemExit(status)


def _ignore_signals() -> None:
    """Ignore further signals, so that none cuts the last message short."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)


class _Logs(DefaultLogsSpecs):
    """Log settings of torchrun: its folder contains error files only, as each rank logs itself."""

    def __init__(self, folder: str, met: Callable[[list[dict[str, str]]], None]) -> None:
        super().__init__(folder)
        self._met = met

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Report that all nodes have met; torchrun calls this before it starts the processes."""
        self._met(list(envs.values()))
        return super().reify(envs)


class _Meeting:
    """Rendezvous of all nodes: reports what it waits for; exits at a signal or after a timeout."""

    def __init__(self, console: TextIO, nodes: int) -> None:
        self._console = console
        self._nodes = nodes
        self._timeout = environment.positive("RDZV_TIMEOUT", 900)
        self._endpoint = os.environ.get("RDZV_ENDPOINT", "")
        self._signals = ended_by(self._stop)
        self._patience = Heartbeat(self._say, self._waits)
        # torch's own timeouts have no effect if another program listens at the port.
        self._limit = threading.Timer(self._timeout, self._give_up)
        self._limit.daemon = True

    def __enter__(self) -> _Meeting:
        self._signals.__enter__()
        if self._nodes > 1:
            self._patience.__enter__()
            self._limit.start()
        self._is_open = True
        return self

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            self._patience.end()
            self._limit.cancel()
            self._signals.__exit__(None, None, None)

    def __exit__(self, *exception: object) -> None:
        self.close()

    def failed(self) -> str:
        return (
            f"RDZV_ENDPOINT={self._endpoint}: the {self._nodes} nodes have not found each other in "
            f"RDZV_TIMEOUT={self._timeout} s: {self._seen()}"
        )

    def _give_up(self) -> NoReturn:
        self._say(f"error: {self.failed()}")
        os._exit(1)

    def _waits(self, seconds: int) -> str:
        return (
            f"waiting for the other nodes at RDZV_ENDPOINT={self._endpoint} since {seconds} s: "
            f"{self._seen()}; gives up after RDZV_TIMEOUT={self._timeout} s"
        )

    def _seen(self) -> str:
        """Probe the endpoint and describe the result."""
        host, port = parse_rendezvous_endpoint(self._endpoint, environment.DEFAULT_PORT)
        try:
            socket.create_connection((host, port), timeout=3).close()
        except OSError as error:
            return f"cannot connect ({error.strerror or error}): start that node"
        if not _is_store(host, port):
            return "another program listens there: free the port, or set another"
        return (
            f"some of the {self._nodes} nodes (NNODES) have not started, or have another dump_folder: "
            "set the same RDZV_ID on all nodes then"
        )

    def _stop(self, number: signal.Signals) -> NoReturn:
        self._say(train.stopped(number, "nothing, no process was started"))
        os._exit(128 + number)

    def _say(self, line: str) -> None:
        rank_log.report(line, self._console)


def _is_store(host: str, port: int) -> bool:
    """Return True if torch's store answers within 5 s; its own client would wait for ever."""
    answered = threading.Event()

    def ask() -> None:
        with contextlib.suppress(DistError):
            TCPStore(host, port, wait_for_workers=False)
            answered.set()

    threading.Thread(target=ask, daemon=True).start()
    return answered.wait(5)


def _rendezvous(nodes: int) -> dict:
    """Return the rendezvous part of LaunchConfig; only a static rendezvous uses a node rank."""
    endpoint = os.environ.get("RDZV_ENDPOINT")
    if nodes == 1:
        return {"rdzv_backend": "c10d", "rdzv_endpoint": endpoint or "localhost:0"}
    host, port = parse_rendezvous_endpoint(endpoint, environment.DEFAULT_PORT)
    seconds = environment.positive("RDZV_TIMEOUT", 900) + 60  # _Meeting times out first
    found = {"rdzv_endpoint": f"[{host}]:{port}" if ":" in host else f"{host}:{port}"}
    rank = os.environ.get("NODE_RANK")
    if not rank:
        waits = {"join_timeout": seconds, "read_timeout": seconds}
        return {"rdzv_backend": "c10d", "rdzv_configs": waits, **found}
    return {
        "rdzv_backend": "static",
        "rdzv_configs": {"rank": int(rank), "timeout": seconds},
        **found,
    }
