"""Workloads that a job cannot have are refused in one line."""

from __future__ import annotations

import pytest

from tests.balancing.test_forced_routing import TINY, force
from titan_moe_lb.errors import JobError
from titan_moe_lb.job import job_config


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('type = "hot_experts", num_hot = 2, fraction = 1.5', "fraction is 1.5; it must be in"),
        ('type = "burst", num_hot = 2, fraction = 0.0', "burst fraction is 0.0; it must be in"),
        ('type = "hot_experts", num_hot = 0, fraction = 0.5', "num_hot is 0; it must be at least"),
        (
            'type = "hot_experts", num_hot = 9, fraction = 0.5',
            "makes 9 experts hot and .* has 8: leave at least one cold",
        ),
        ('type = "rotating", num_hot = 8, fraction = 1.0', "makes 8 experts hot"),
        ('type = "burst", num_hot = 1, fraction = 0.75', r"fraction must be in \[0, 0.5\]"),
        ('type = "rotating", num_hot = 7, fraction = 0.25', r"fraction must be in \[0.5, 1\]"),
        ('type = "rotating", num_hot = 2, fraction = 0.5, period = 0', "rotating period is 0; it"),
        ('type = "burst", num_hot = 2, fraction = 0.5, period = -1', "burst period is -1; it must"),
        ('type = "zero_load", num_zero = 0', "num_zero is 0; it must be at least 1"),
        ('type = "zero_load", num_zero = 7', "num_zero must be at most 6"),
        ('type = "zero_load", num_zero = 2, placement = "far"', "placement"),
        ('type = "ragged", fraction = 0.0', "ragged fraction is 0.0; it must be in"),
        (
            'type = "ragged", fraction = 0.5, distance = 1.0',
            r"distance is 1.0; it must be in \[0, 1",
        ),
        ('type = "burst", num_hot = 2, fraction = 0.5, num_micro_batches = 2', "num_micro_batches"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, table, message):
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(JobError, match=message) as refusal:
        job_config.load([*TINY, *force(table)])
    assert "\n" not in str(refusal.value)


def test_all_ranks_cannot_be_hot(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    forced = force('type = "hot_rank", ranks = [0, 1], fraction = 1.0')
    with pytest.raises(JobError, match="makes 8 experts hot"):
        job_config.load([*TINY, "--parallelism.expert_parallel_degree=2", *forced])


LARGE = ["--module", "deepseek_v3", "--config", "deepseek_v3_671b"]


@pytest.mark.parametrize(
    ("table", "groups"),
    [
        # 8 hot experts, one in each of 8 groups; in steps 1 to 3 of 4 a burst would not show.
        ('type = "hot_experts", num_hot = 8, fraction = 1.0, placement = "spread"', 8),
        ('type = "burst", num_hot = 8, fraction = 1.0, placement = "spread"', 8),
        ('type = "rotating", num_hot = 12, fraction = 1.0', None),
        ('type = "round_robin"', None),
        ('type = "zero_load", num_zero = 32, placement = "spread"', None),
        ('type = "ragged", fraction = 0.5', None),
    ],
)
def test_group_limit_of_a_large_model(monkeypatch, table, groups):
    monkeypatch.setenv("WORLD_SIZE", "64")
    if groups is None:
        job_config.load([*LARGE, *force(table)])
        return
    with pytest.raises(JobError, match=f"sends a token to {groups} expert groups and .* allows 4"):
        job_config.load([*LARGE, *force(table)])
