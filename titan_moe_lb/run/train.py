"""One process of a job: ``python -m titan_moe_lb.run.train``, under torchrun or alone.

``titan_moe_lb.run.launch`` starts it with the right number of processes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from titan_moe_lb.run import parent_process

if __name__ == "__main__":  # before the slow imports
    parent_process.end_with_launcher(or_agent=True)

import torch
from torch.distributed.checkpoint import CheckpointException
from torchtitan.config.override import derive
from torchtitan.observability import structured_logger
from torchtitan.trainer import Trainer

from titan_moe_lb.errors import JobError
from titan_moe_lb.job import job_config
from titan_moe_lb.parallel import single_process
from titan_moe_lb.resolved_job import Job
from titan_moe_lb.run import dry_run, environment
from titan_moe_lb.run.console import cause, rank_log, summary
from titan_moe_lb.run.console.saved import Saved
from titan_moe_lb.run.console.signals import die_of, ended_by
from titan_moe_lb.terminal import run_folder
from titan_moe_lb.terminal.heartbeat import Heartbeat
from titan_moe_lb.upstream import cpu, finite_data, zero_bubble

CLOSING_SECONDS = 5
"""Longest wait for TensorBoard and W&B once a signal has ended a run."""


def main(arguments: list[str] | None = None) -> None:
    """Resolve the job and train it."""
    # Ctrl-C ends this process without a traceback; the launcher reports it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Drop torchtitan's warnings about a config: it repeats them when it builds the model.
    logging.root.addHandler(logging.NullHandler())
    try:
        job = job_config.load(sys.argv[1:] if arguments is None else arguments)
    except JobError as error:
        exit_with(error)
    run(job)


def trainer_config(*arguments: str) -> Trainer.Config:
    """Return a job for torchtitan's own Trainer: ``trainer_config(...).build().train()``.

    Args:
        arguments: the command line of a job, as for ``run_train.sh``.
    """
    job = job_config.load(list(arguments))
    _adapt(job)
    return _preparing(job.config)


def _adapt(job: Job) -> None:
    """Adapt a job to this machine and to torchtitan 0.3.0."""
    config = job.config
    if cpu.needed():
        cpu.adapt(config)
    zero_bubble.adapt(config)
    finite_data.adapt(config, job.cut)


def _preparing(config: Trainer.Config) -> Trainer.Config:
    """Derive a config whose ``build()`` prepares this process; loading a job does not."""
    upstream = type(config)

    @dataclass(kw_only=True, slots=True)
    class Config(upstream):  # type: ignore[misc, valid-type]
        def build(self, **kwargs: Any) -> Trainer:
            if not single_process.is_launched():
                single_process.announce()
            cpu.prepare()
            return upstream.build(self, **kwargs)

    Config.__qualname__ = upstream.__qualname__
    return derive(config, Config)


def run(job: Job, *, alone: bool = False) -> None:
    """Train a resolved job in this process, or only build it if it is a dry run.

    ``alone``: there is no launcher. This process has already claimed the run's folder, and reports
    signals on the console.
    """
    config = job.config
    cpu.prepare()
    _adapt(job)
    job.bind()
    if config.comm.mode != "default":
        _say(summary.model(job))
        _build(job)
        return
    if not alone:
        try:
            run_folder.claim(config.dump_folder, environment.joined_run())
        except JobError as error:
            exit_with(error)
    _Rank(job, alone=alone).train()


class _Rank:
    """One rank of a run, in this process."""

    def __init__(self, job: Job, *, alone: bool) -> None:
        self._job, self._config = job, job.config
        self._alone = alone
        self._rank = int(os.environ["RANK"])
        self._saved = Saved(job.config)
        self._log = rank_log.folder_of(job.config.dump_folder) / f"rank{self._rank}.log"
        self._errors = rank_log.divert_errors(self._log)
        self._trainer: Trainer | None = None
        self._is_stopped = threading.Event()

    def train(self) -> None:
        shown = summary.ranks_shown(self._job)
        is_shown = self._rank in shown
        with contextlib.ExitStack() as stack:
            stack.enter_context(ended_by(self._stop))
            waits = Heartbeat(_say, self._first_step_takes)
            rank_log.begin(
                shown=is_shown,
                prefix=f"[rank{self._rank}] " if len(shown) > 1 else "",
                known=rank_log.StepLine(
                    loss=summary.knows_loss(self._job, self._rank),
                    peak_flops=not cpu.needed(),
                ),
                first_step=waits.end,
            )
            if is_shown:
                _say(summary.before(self._job, self._rank))
                stack.enter_context(waits)
            try:
                self._train()
            except (Exception, CheckpointException) as error:  # the latter is no Exception
                self._fail(error)
        if is_shown:
            _say(summary.after(self._config, self._saved))

    def _train(self) -> None:
        """Train as torchtitan's ``main`` does, without reading the job a second time."""
        config = self._config
        structured_logger.init_structured_logger(
            source="training",
            output_dir=config.dump_folder,
            enable=config.debug.enable_structured_logging,
        )
        trainer = self._trainer = config.build()
        try:
            if config.checkpoint.create_seed_checkpoint:
                trainer.checkpointer.save(curr_step=0, last_step=True)
            else:
                trainer.train()
        finally:
            trainer.close()
        torch.distributed.destroy_process_group()

    def _first_step_takes(self, seconds: int) -> str:
        if self._trainer is None:
            return f"building the model: {seconds} s so far"
        compiles = ", which compiles the model" if self._config.compile.enable else ""
        return f"still in the first step{compiles}: {seconds} s so far"

    def _fail(self, error: BaseException) -> NoReturn:
        at_start = self._trainer is None or self._trainer.step == 0
        found = cause.of_error(error, self._job, at_start=at_start)
        with contextlib.suppress(OSError):  # the disk of the log may be full
            traceback.print_exception(error)
        if self._is_stopped.is_set():  # the ranks that have stopped already are missed here
            threading.Event().wait()
        if not cause.tell_launcher(found):
            rank_log.report(f"error: {found.sentence(self._saved, self._log)}", self._errors)
        _leave(found.status)

    def _stop(self, number: signal.Signals) -> NoReturn:
        self._is_stopped.set()
        self._close_sinks()
        if self._alone:
            rank_log.report(stopped(number, self._saved), self._errors)
            _leave(128 + number)
        die_of(number)

    def _close_sinks(self) -> None:
        """Let TensorBoard and W&B write the last steps, which they buffer.

        A daemon thread closes them, because a sink may wait for the network.
        """
        if self._trainer is not None:
            processor = self._trainer.metrics_processor
            stop = getattr(processor, "stop", processor.close)  # torchtitan's own has none
            closing = threading.Thread(target=stop, daemon=True)
            closing.start()
            closing.join(CLOSING_SECONDS)


def _build(job: Job) -> None:
    """Build one rank of a job without its peers."""
    if job.config.comm.mode == "local_tensor":
        _say("torchtitan 0.3.0 trains nothing in the local_tensor mode")
        return
    log = Path(tempfile.gettempdir(), f"titan_moe_lb-dry-run-{os.getpid()}.log")
    errors = rank_log.divert_errors(log)
    rank_log.begin(shown=True, known=rank_log.StepLine())
    try:
        with Heartbeat(_say, lambda seconds: f"building one rank: {seconds} s so far"):
            dry_run.run(job.config)
    except Exception as error:
        found = cause.of_error(error, job, at_start=True)
        traceback.print_exception(error)
        print(f"titan_moe_lb: error: {found.sentence('nothing', log)}", file=errors)
        _leave(found.status)
    log.unlink()


def stopped(number: signal.Signals, saved: object) -> str:
    """Describe the end of a run by a signal, in one line."""
    name = "Ctrl-C" if number == signal.SIGINT else number.name
    return f"stopped by {name}; saved: {saved}; status {128 + number}"


def exit_with(error: JobError) -> NoReturn:
    """Report a user's mistake in one line and exit with status 2."""
    found = cause.Cause(line=str(error), status=2, has_traceback=False)
    if not cause.tell_launcher(found):
        print(f"titan_moe_lb: error: {error}", file=sys.stderr)
    raise SystemExit(2)


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # the reader has closed the pipe
        print(line, flush=True)


def _leave(status: int) -> NoReturn:
    """End this process without waiting for its threads and process groups."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
    if cpu.needed():
        cpu.leave()
