"""Tests of refused forced routing: one line names the key."""

from __future__ import annotations

import pytest

from tests.balancing.test_forced_routing import TINY, force
from titan_moe_lb.errors import JobError
from titan_moe_lb.job import job_config

REFUSED = {
    'type = "hotrank"': "hot_rank",
    'type = "hot_experts", num_hot = 2, fraction = 1.5': "hot_experts fraction",
    'type = "hot_experts", num_hot = 0, fraction = 0.5': "hot_experts num_hot",
    'type = "hot_experts", num_hot = 9, fraction = 0.5': "makes 9 experts hot",
    'type = "hot_rank", rank = 0': "fraction",
    'type = "hot_rank", rank = 0, fraction = 0.5': "expert_parallel_degree is 1",
    'type = "hot_rank", fraction = 0.5': "rank or ranks",
    'type = "rotating", num_hot = 8, fraction = 1.0': "makes 8 experts hot",
    'type = "rotating", num_hot = 7, fraction = 0.25': r"fraction must be in \[0.5, 1\]",
    'type = "rotating", num_hot = 2, fraction = 0.5, period = 0': "rotating period",
    'type = "burst", num_hot = 2, fraction = 0.0': "burst fraction",
    'type = "burst", num_hot = 1, fraction = 0.75': r"fraction must be in \[0, 0.5\]",
    'type = "burst", num_hot = 2, fraction = 0.5, period = -1': "burst period",
    'type = "burst", num_hot = 2, fraction = 0.5, num_micro_batches = 2': "num_micro_batches",
    'type = "zero_load", num_zero = 0': "zero_load num_zero",
    'type = "zero_load", num_zero = 7': "num_zero must be at most 6",
    'type = "zero_load", num_zero = 2, placement = "far"': "placement",
    'type = "ragged", fraction = 0.0': "ragged fraction",
    'type = "ragged", fraction = 0.5, distance = 1.0': "ragged distance",
    'type = "biased_normal", std = -1.0': "biased_normal std",
    'type = "replay", trace = "/nowhere"': "/nowhere",
}
REFUSED_ON_EP = {
    (2, 'type = "hot_rank", rank = 2, fraction = 0.5'): "has rank 2",
    (2, 'type = "hot_rank", rank = -1, fraction = 0.5'): "has rank -1",
    (2, 'type = "hot_rank", ranks = [0, 1], fraction = 1.0'): "makes 8 experts hot",
    # Rank 0 of 8 has one expert, and a token takes two different ones.
    (8, 'type = "hot_rank", rank = 0, fraction = 0.75'): r"fraction must be in \[0, 0.5\]",
}


def assert_refused(flags: list[str], named: str, ranks: int = 1) -> None:
    with pytest.raises(JobError, match=named) as refusal:
        job_config.load([*TINY, *flags], ranks)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("table", REFUSED)
def test_table_is_refused(table):
    assert_refused(force(table), REFUSED[table])


@pytest.mark.parametrize(("ep", "table"), REFUSED_ON_EP)
def test_table_is_refused_on_an_expert_parallel_degree(ep, table):
    flags = [f"--parallelism.expert_parallel_degree={ep}", *force(table)]
    assert_refused(flags, REFUSED_ON_EP[ep, table], ep)


def test_two_strategies_at_once():
    both = '--model.forced_routing=[{type = "round_robin"}, {type = "random_balanced"}]'
    assert_refused([both], "forced_routing is .* one table with a type")
    flags = [*force('type = "round_robin"'), "--debug.moe_force_load_balance"]
    assert_refused(flags, "moe_force_load_balance")


@pytest.mark.parametrize("step", [-3, 0, 11])
def test_recorded_step_that_never_comes(step):
    assert_refused(["--metrics.record_routing_steps", str(step)], f"has step {step};")


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
def test_group_limit_of_a_large_model(table, groups):
    large = ["--module=deepseek_v3", "--config=deepseek_v3_671b"]
    if groups is None:
        job_config.load([*large, *force(table)], 64)
        return
    with pytest.raises(JobError, match=f"sends a token to {groups} expert groups and .* allows 4"):
        job_config.load([*large, *force(table)], 64)
