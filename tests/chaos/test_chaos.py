"""Tests of faults: a short form of ``python -m tests.chaos``."""

from __future__ import annotations

import random
import re
import shutil

import pytest

from tests.chaos.job import JOB, differences
from tests.chaos.run import Tally, peaceful_run, try_one
from tests.support.job_processes import end, fork, read_to, working_in
from titan_moe_lb.traces.batch_reader import END
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
    file.write_bytes(file.read_bytes()[: -len(END) - 1])
    assert differences(other, peace)[-1] == "steps of the trace: [1, 2, 3, 4, 5, 6, 7]"
    assert "steps" in differences(other, peace, frozenset({7}))[-1]


def test_a_killed_process_is_started_again_without_a_person(tmp_path):
    """With --max-restarts, processes and console are those of a user."""
    steps = 30
    flags = [
        "--module=deepseek_v3",
        "--config=deepseek_v3_tiny",
        f"--training.steps={steps}",
        *JOB[8:],
        "--max-restarts=2",
    ]
    job = fork(tmp_path, *flags, warm_ranks=2)
    printed = read_to(job, "step:  3")
    (rank,) = working_in(tmp_path / "logs/rank0.log")
    rank.kill()
    status, out, err = end(job, tmp_path)
    assert status == 0, err
    (line,) = err.splitlines()
    (resumed,) = (
        int(step) for step in re.findall("resumes after step (\\d+)", "".join([*printed, *out]))
    )
    for text in ("rank 0", "SIGKILL", f"checkpoint of step {resumed} ", "(1 of 2)"):
        assert text in line
    trace = read_trace(tmp_path)
    assert trace.steps.tolist() == list(range(1, steps + 1)) and trace.damage == ()
    assert trace.info.resumed_at == (resumed + 1,)
