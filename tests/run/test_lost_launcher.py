"""Tests of runs that lose their launcher or terminal, in real processes.

No rank outlives the run, and its folder is taken as long as a rank lives.
"""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.support.job_processes import (
    TINY,
    end,
    fork,
    last_step,
    read_to,
    run,
    until,
    working_in,
)

LONG = [*TINY, "--training.steps=100000"]
_SECONDS = 10
"""Seconds in which a process must end. Workers of a data loader check their rank every 5 s."""


def tree(process_id: int) -> list[psutil.Process]:
    return psutil.Process(process_id).children(recursive=True)


def assert_gone(processes: list[psutil.Process]) -> None:
    _gone, alive = psutil.wait_procs(processes, timeout=_SECONDS)
    assert [one for one in alive if one.status() != psutil.STATUS_ZOMBIE] == []


@pytest.fixture(autouse=True)
def nobody_is_left(tmp_path):
    yield
    for one in working_in(tmp_path):
        one.kill()


def train_in(folder: Path) -> tuple[int, str]:
    """Train one step in the same folder; return status and standard error."""
    process = fork(folder, *TINY, "--training.steps=1")
    _out, err = process.communicate(timeout=120)
    return process.returncode, err


def test_no_rank_outlives_a_launcher_that_was_killed(tmp_path):
    """No worker of its data loader outlives it either, and the folder is then free."""
    process = fork(tmp_path, *LONG, "--dataloader.num_workers=1", NGPU="2")
    read_to(process, "step:  2")
    others = tree(process.pid)
    assert len(others) >= 4
    process.kill()
    assert_gone(others)
    process.communicate(timeout=60)
    assert train_in(tmp_path) == (0, "")


def test_no_rank_outlives_a_launcher_that_was_killed_while_the_ranks_import(tmp_path):
    process = fork(tmp_path, *LONG, NGPU="2", warm_ranks=0)
    until(lambda: len(tree(process.pid)) == 2)
    others = tree(process.pid)
    process.kill()
    assert_gone(others)
    process.communicate(timeout=60)


def test_no_rank_outlives_an_agent_of_torchrun(tmp_path):
    """Only the rank holds the folder, as long as it lives."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    process = run([*torchrun, "-m", "titan_moe_lb.run.train", *LONG, f"--dump_folder={tmp_path}"])
    read_to(process, "step:  1")
    status, err = train_in(tmp_path)
    assert status == 2 and "dump_folder" in err and str(tmp_path) in err, err
    ranks = tree(process.pid)
    process.kill()
    assert_gone(ranks)
    process.communicate(timeout=60)
    assert train_in(tmp_path) == (0, "")


STUDY = """
import sys
from pathlib import Path
from titan_moe_lb.commands.study.cell import Cell, CellFolder
from titan_moe_lb.commands.study.run import Runner
cell = Cell(labels={"one": "a"}, seed=None, flags=sys.argv[2:], ranks=1)
nobody = lambda *_: None
Runner(1, 1).run(iter([CellFolder(Path(sys.argv[1]), cell)]), began=nobody, ended=nobody)
"""


def test_no_process_outlives_a_study_that_was_killed(tmp_path):
    study = subprocess.Popen([sys.executable, "-c", STUDY, str(tmp_path), *LONG])
    log = tmp_path / "cells/a/log"
    until(lambda: log.is_file() and "step:  1" in log.read_text(), seconds=120)
    others = tree(study.pid)
    assert len(others) == 1
    study.kill()
    study.wait()
    assert_gone(others)


def test_a_terminal_that_is_closed_leaves_the_line_in_the_log(tmp_path):
    ours, theirs = pty.openpty()
    process = fork(tmp_path, *LONG, NGPU="2", terminal=os.ttyname(theirs))
    with os.fdopen(ours, "rb") as opened:
        assert any(b"step:  3" in line for line in opened)
        others = tree(process.pid)
        os.close(theirs)
    process.communicate(timeout=60)
    assert process.returncode == 129
    assert_gone(others)
    said = (tmp_path / "logs/launcher.log").read_text()
    assert "SIGHUP" in said and last_step(said)


def test_nohup_lets_a_run_go_on(tmp_path):
    """The ranks start as a user's do."""
    flags = [*TINY, "--training.steps=6"]
    process = fork(tmp_path, *flags, NGPU="2", warm_ranks=0, nohup=True)
    read_to(process, "step:  2")
    process.send_signal(signal.SIGHUP)
    status, out, _err = end(process, tmp_path)
    assert status == 0 and out[-1].startswith("done")
