"""A job that is killed goes on as if it had not been: a short form of ``python -m tests.chaos``."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import time
from pathlib import Path

import psutil
import pytest

from tests.chaos import launcher
from tests.chaos.job import JOB, differences
from tests.chaos.run import Tally, peaceful_run, try_one
from titan_moe_lb.traces.trace import FILE_NAME, read_trace

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def peace(tmp_path_factory):
    return peaceful_run(tmp_path_factory.mktemp("chaos"))


def test_ranks_that_are_killed_in_a_save_change_nothing(peace, tmp_path):
    tally, kind = Tally(), "all ranks killed while a checkpoint is written"
    verdict = try_one(kind, random.Random(3), tmp_path / "run", peace, tally)
    assert tally.survived == 1, verdict


def test_the_comparison_can_fail(peace, tmp_path):
    assert differences(peace, peace) == []
    other = shutil.copytree(peace, tmp_path / "other")
    shutil.rmtree(other / "checkpoint/step-8")
    (other / "checkpoint/step-6").rename(other / "checkpoint/step-8")
    wrong = differences(other, peace)
    assert "tok_embeddings.weight" in wrong and any("expert_bias" in name for name in wrong)
    file = other / FILE_NAME
    file.write_bytes(file.read_bytes()[:-1])
    assert differences(other, peace)[-1] == "steps of the trace: [1, 2, 3, 4, 5, 6, 7]"
    assert "steps" in differences(other, peace, frozenset({7}))[-1]


def test_a_killed_process_is_started_again_without_a_person(tmp_path):
    """--max-restarts: the processes are those of a user, and so is what is said."""
    steps = 30
    flags = [*JOB[:2], f"--training.steps={steps}", *JOB[8:], "--max-restarts=2"]
    flags += [f"--dump_folder={tmp_path}/run"]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.host_imports"])
    process = context.Process(target=launcher.run, args=(flags, str(tmp_path / "console")))
    process.start()
    (rank,) = _ranks_at_step(process.pid, tmp_path / "run", 3)
    rank.kill()
    process.join(240)
    said = (tmp_path / "console").read_text()
    assert process.exitcode == 0, said
    assert "rank 0 was killed by SIGKILL" in said
    assert f"saved: checkpoint of step {_resumed(said)} " in said
    assert "; starting again (1 of 2)\n" in said
    trace = read_trace(tmp_path / "run")
    assert trace.steps.tolist() == list(range(1, steps + 1)) and trace.damage == ()
    assert trace.info.resumed_at == (_resumed(said) + 1,)


def _ranks_at_step(launcher_id: int, folder: Path, step: int) -> list[psutil.Process]:
    due = time.monotonic() + 120
    while time.monotonic() < due:
        time.sleep(0.05)
        try:
            if read_trace(folder).steps[-1] >= step:
                return psutil.Process(launcher_id).children()
        except ValueError:
            assert psutil.pid_exists(launcher_id), os.listdir(folder.parent)
    raise AssertionError("the job does not come to its step")


def _resumed(said: str) -> int:
    return int(said.partition("goes on after step ")[2].split()[0])
