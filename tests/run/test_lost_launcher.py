"""A run that loses its launcher or its terminal: no rank outlives it, and its folder is taken as
long as one lives. Real processes."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.run.test_console import TINY, _words, end, fork, last_step, of_a_start, read_to, start
from titan_moe_lb.run.console.signals import ended_by

LONG = [*TINY, "--training.steps=100000"]
_SECONDS = 10
"""In which a process has to be gone. Workers of a data loader look for their rank every 5 s."""


def tree(process_id: int) -> list[psutil.Process]:
    return psutil.Process(process_id).children(recursive=True)


def until(holds: Callable[[], bool], seconds: float = 60) -> None:
    due = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < due
        time.sleep(0.02)


def assert_gone(processes: list[psutil.Process]) -> None:
    _gone, alive = psutil.wait_procs(processes, timeout=_SECONDS)
    assert [one for one in alive if one.status() != psutil.STATUS_ZOMBIE] == []


@pytest.fixture(autouse=True)
def nobody_is_left(tmp_path):
    yield
    for one in psutil.process_iter():
        if any(str(tmp_path) in word for word in _words(one)):
            one.kill()


def train_in(folder: Path) -> tuple[int, str]:
    """Status and standard error of a second run there, of one step."""
    process = fork(folder, *TINY, "--training.steps=1")
    _out, err = process.communicate(timeout=120)
    return process.returncode, err


@pytest.mark.parametrize("moment", ["start", "step"])
def test_no_rank_outlives_a_launcher_that_was_killed(moment, tmp_path):
    """Nor a worker of its data loader. The folder is free then."""
    process = fork(tmp_path, *LONG, "--dataloader.num_workers=1", NGPU="2")
    if moment == "step":
        read_to(process, "step:  2")
        assert len(tree(process.pid)) >= 4
    else:
        until(lambda: len(tree(process.pid)) == 2)
    others = tree(process.pid)
    process.send_signal(signal.SIGKILL)
    assert_gone(others)
    process.communicate(timeout=60)
    if moment == "step":
        assert train_in(tmp_path) == (0, "")


def test_no_rank_outlives_an_agent_of_torchrun(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    process = subprocess.Popen(
        [*torchrun, "-m", "titan_moe_lb.run.train", *LONG, f"--dump_folder={tmp_path}"],
        env=of_a_start({}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    read_to(process, "step:  1")
    status, err = train_in(tmp_path)
    assert status == 2 and "dump_folder" in err, err
    ranks = tree(process.pid)
    process.kill()
    assert_gone(ranks)
    process.communicate(timeout=60)


def test_a_folder_is_taken_as_long_as_a_rank_lives(tmp_path):
    """One that nothing has ended with its launcher, as where the kernel cannot."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    rank = subprocess.Popen(
        [sys.executable, "-m", "titan_moe_lb.run.train", *LONG, f"--dump_folder={tmp_path}"],
        env=of_a_start(alone | {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    read_to(rank, "step:  1")
    status, err = train_in(tmp_path)
    assert status == 2 and "dump_folder" in err and str(tmp_path) in err, err
    rank.kill()
    rank.communicate(timeout=60)
    assert train_in(tmp_path) == (0, "")


STUDY = """
import sys
from pathlib import Path
from titan_moe_lb.commands.study.cell import Cell, CellFolder
from titan_moe_lb.commands.study.run import Runner
cell = Cell(labels={"one": "a"}, seed=None, flags=sys.argv[2:], ranks=2)
nobody = lambda *_: None
Runner(1, 1).run(iter([CellFolder(Path(sys.argv[1]), cell)]), began=nobody, ended=nobody)
"""


def test_no_process_outlives_a_study_that_was_killed(tmp_path):
    study = subprocess.Popen([sys.executable, "-c", STUDY, str(tmp_path), *LONG])
    log = tmp_path / "cells/a/log"
    until(lambda: log.is_file() and "step:  1" in log.read_text(), seconds=120)
    others = tree(study.pid)
    assert len(others) == 3  # the launcher of the cell and its ranks
    study.kill()
    study.wait()
    assert_gone(others)


def test_sighup_of_one_process_is_a_line_and_its_status(tmp_path):
    process = fork(tmp_path, *LONG)
    read_to(process, "step:  3")
    process.send_signal(signal.SIGHUP)
    status, _out, err = end(process)
    assert status == 129 and err.count("\n") == 1, err
    assert "SIGHUP" in err and "no checkpoint" in err and last_step(err) >= 3


def test_a_terminal_that_is_closed_leaves_the_line_in_the_log(tmp_path):
    process_id, terminal = pty.fork()
    if not process_id:
        train = [sys.executable, "-m", "titan_moe_lb.cli", "train"]
        environment = of_a_start({"NGPU": "2"})
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the suite itself may run under nohup
        os.execve(sys.executable, [*train, *LONG, f"--dump_folder={tmp_path}"], environment)
    with os.fdopen(terminal, "rb", closefd=True) as opened, contextlib.suppress(OSError):
        for line in opened:
            if b"step:  3" in line:
                break
    others = tree(process_id)
    assert os.waitstatus_to_exitcode(os.waitpid(process_id, 0)[1]) == 129
    assert_gone(others)
    said = (tmp_path / "logs/launcher.log").read_text()
    assert "SIGHUP" in said and last_step(said)


def test_nohup_lets_a_run_go_on(tmp_path):
    process = start(tmp_path, *TINY, "--training.steps=6", within=("nohup",), NGPU="2")
    read_to(process, "step:  2")
    process.send_signal(signal.SIGHUP)
    status, out, _err = end(process)
    assert status == 0 and out[-1].startswith("done")


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ended_by(lambda number: pytest.fail(number.name)):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
