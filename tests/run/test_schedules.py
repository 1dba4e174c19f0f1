"""Tests of pipeline schedules: our actions, against those that torch's pipelines run, and their
memory."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support import pipelines
from titan_moe_lb.errors import JobError
from titan_moe_lb.job import job_config
from titan_moe_lb.parallel.schedules import (
    SCHEDULES,
    actions_of,
    one_forward_one_backward,
    peak,
    stages_of,
)
from titan_moe_lb.rules.pipeline import micro_batches_fit_schedule

# All forwards, then all backwards in the other order, one of them in two passes.
BY_HAND = [
    [f"{stage}F{m}" for stage in (0, 2) for m in range(6)]
    + [f"2B{m}" for m in range(6)]
    + [f"0B{m}" for m in range(5)]
    + ["0I5", "0W5"],
    [f"{stage}F{m}" for stage in (1, 3) for m in range(6)]
    + [f"{stage}B{m}" for stage in (3, 1) for m in range(6)],
]


@pytest.mark.parametrize("name", [*SCHEDULES, "csv"])
def test_the_actions_are_those_that_run(ranks, name, tmp_path):
    rows = BY_HAND if name == "csv" else None
    results = ranks.run(pipelines.RANKS, pipelines.read_and_run, name, rows, str(tmp_path))
    for rank, (schedule, ran) in enumerate(results):
        assert schedule[rank] == ran
        assert schedule == results[0][0]
        assert len(stages_of(ran)) == (1 if name in ("1F1B", "GPipe") else 2)


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_job_is_refused_where_torch_would_refuse_it(ranks, name, num_ranks):
    """The number of micro-batches decides."""
    flags = [
        f"--parallelism.pipeline_parallel_degree={num_ranks}",
        f"--parallelism.pipeline_parallel_schedule={name}",
    ]
    module = ["--module", "deepseek_v3", "--config", "deepseek_v3_tiny"]
    job = job_config.load([*module, *flags], num_ranks)
    numbers = []
    for number in range(1, 11):
        job.config.training.local_batch_size = number
        try:
            micro_batches_fit_schedule(job)
        except JobError:
            continue
        numbers.append(number)
    assert numbers == ranks.run(1, pipelines.accepted, name, num_ranks, 10)[0]


def test_without_a_pipeline():
    assert actions_of(None) == {0: [(0, "F", 0), (0, "B", 0)]}


def test_1f1b_holds_as_many_micro_batches_as_there_are_stages_behind():
    schedule = one_forward_one_backward(4, 8)
    peaks = [peak(schedule[rank], lambda *_: 10.0, lambda *_: 1.0) for rank in range(4)]
    assert peaks == [41, 31, 21, 11]


def test_kept_until_the_pass_for_the_weights():
    actions = [(0, "F", 0), (0, "I", 0), (0, "F", 1), (0, "W", 0), (0, "I", 1), (0, "W", 1)]
    assert peak(actions, lambda *_: 5.0) == 10
    whole = [(0, "F", 0), (0, "B", 0), (0, "F", 1), (0, "B", 1)]
    assert peak(whole, lambda *_: 5.0) == 5


def test_what_a_backward_leaves_stays_until_the_end():
    # F0 F1 B0 F2 B1 B2: held 5 10 6 11 7 3, and the peak before the second backward.
    actions = one_forward_one_backward(2, 3)[0]
    assert peak(actions, lambda *_: 5.0, left=lambda _stage: 1.0) == 11


def test_each_micro_batch_has_its_own_tokens():
    """Micro-batches are ragged; the arrays have one entry for each accumulation step."""
    tokens = {
        (0, 0): np.array([1, 7]), (0, 1): np.array([4, 2]), (0, 2): np.array([9, 1])
    }  # fmt: skip
    actions = one_forward_one_backward(2, 3)[0]
    # F0 F1 B0 F2 B1 B2: held 1 5 4 13 9 0, and 7 9 2 3 1 0.
    assert peak(actions, lambda *key: tokens[key]).tolist() == [13, 9]
