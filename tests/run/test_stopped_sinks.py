"""A run that a signal ends loses no step: what its console shows, every sink has. Real processes."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.support.job_processes import TINY, end, environment, fork, last_step, read_to
from tests.support.sink_files import tensorboard, wandb
from titan_moe_lb.traces.trace import read_trace

LONG = [*TINY, "--training.steps=100000"]
SINKS = ["--metrics.enable_tensorboard", "--metrics.enable_wandb"]
PP2 = "--parallelism.pipeline_parallel_degree=2"


def assert_every_sink_has(lines: list[str], err: str, folder: Path) -> None:
    """Every step that the console shows, and no further one."""
    shown = [int(found[1]) for line in lines if (found := re.match(r"step: +(\d+)", line))]
    steps = list(range(1, shown[-1] + 1))
    assert shown == steps and last_step(err) == steps[-1]
    assert read_trace(folder).steps.tolist() == steps
    for written in (tensorboard(folder), wandb(folder)):
        for name in ("loss_metrics/global_avg_loss", "moe/max_violation"):
            assert list(written[name]) == steps


@pytest.mark.parametrize(
    ("number", "layout", "ranks"),
    [(signal.SIGTERM, [], 2), (signal.SIGINT, [PP2], 2), (signal.SIGTERM, [], 1)],
    ids=["SIGTERM", "SIGINT-PP2", "SIGTERM-one"],
)
def test_a_signal_closes_the_sinks(number, layout, ranks, tmp_path):
    """The sinks of PP2 are those of rank 1."""
    process = fork(tmp_path, *LONG, *SINKS, *layout, NGPU=str(ranks), WANDB_MODE="offline")
    lines = read_to(process, "step:  3")
    process.send_signal(number)
    status, rest, err = end(process, tmp_path)
    assert status == 128 + number and err.count("\n") == 1, err
    assert_every_sink_has([*lines, *rest], err, tmp_path)


def test_a_scheduler_signals_every_process_of_run_train(tmp_path):
    """Each rank gets two signals, which count as one: its own, and that of its launcher."""
    shutil.copy(Path(__file__).parents[2] / "run_train.sh", tmp_path)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    run = tmp_path / "run"
    process = subprocess.Popen(
        [str(tmp_path / "run_train.sh"), *LONG, *SINKS, f"--dump_folder={run}"],
        env=environment(NGPU="2", WANDB_MODE="offline", PYTHON="true"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    lines = read_to(process, "step:  3")
    ranks = psutil.Process(process.pid).children()
    assert len(ranks) == 2
    for one in (process.pid, *(rank.pid for rank in ranks)):
        os.killpg(one, signal.SIGTERM)
    status, rest, err = end(process, run)
    assert status == 143 and err.count("\n") == 1, err
    assert_every_sink_has([*lines, *rest], err, run)


WITH_WORKERS = """
import multiprocessing, time
from titan_moe_lb.run.console.signals import ended_by

def end(number):
    print("ended by", number.name, flush=True)

with ended_by(end):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        print(sum(pool.map(abs, range(-3, 1))), flush=True)
    time.sleep(0.5)
"""


def test_workers_that_a_rank_forks_and_ends_do_not_end_it():
    """The pool of a data set ends its workers by SIGTERM, which is theirs alone."""
    ended = subprocess.run(
        [sys.executable, "-c", WITH_WORKERS], capture_output=True, text=True, timeout=60
    )
    assert (ended.stdout, ended.returncode) == ("6\n", 0), ended.stderr
