"""Tests of torchtitan's MetricsProcessor and the trace: the same steps in real jobs."""

from __future__ import annotations

from typing import Any

import pytest

from titan_moe_lb.errors import JobError
from titan_moe_lb.job import job_config
from titan_moe_lb.traces.routing_trace import RoutingTrace
from titan_moe_lb.traces.trace import read_trace
from titan_moe_lb.upstream import cpu

TINY = ["--module", "deepseek_v3", "--config", "deepseek_v3_tiny", "--training.local_batch_size=4"]
TOKENS = 4 * 128
"""Tokens of one data-parallel rank in one step."""


def train_and_log(arguments: list[str], described: bool = True) -> dict[int, dict[str, Any]]:
    """Metrics of this rank's sinks, by step.

    Args:
        described: fill ``run_info``, which a trainer that calls ``attach()`` itself leaves empty.
    """
    config = job_config.load(["--debug.no-enable-structured-logging", *arguments]).config
    if not described:
        config.metrics.run_info = None
    cpu.adapt(config)
    trainer = config.build()
    logged: dict[int, dict[str, Any]] = {}
    trainer.metrics_processor.logger.log = lambda metrics, step: logged.update({step: metrics})
    trainer.train()
    trainer.close()
    return logged


@pytest.fixture(scope="module")
def paced(ranks, tmp_path_factory):
    """Run on PP2, where rank 1 knows the loss.

    It logs every 3 steps, and records routing in between.
    """
    folder = tmp_path_factory.mktemp("paced")
    flags = [
        *TINY,
        f"--dump_folder={folder}",
        "--parallelism.pipeline_parallel_degree=2",
        "--training.steps=6",
        "--metrics.log_freq=3",
        "--metrics.record_routing_steps",
        "2",
        "5",
    ]
    return folder, ranks.run(2, train_and_log, flags)


def test_recorded_step_out_of_turn_leaves_torchtitans_times_alone(paced):
    folder, by_rank = paced
    assert RoutingTrace(folder).steps == (2, 5)
    for logged in by_rank:
        assert list(logged) == [1, 3, 6]
        metrics = logged[6]
        # Time since the last logged step over log_freq: of all 3 steps, and their tokens.
        window = metrics["time_metrics/end_to_end(s)"] * 3
        tokens = metrics["throughput(tps)"] * window * 2
        assert tokens == pytest.approx(3 * TOKENS, rel=1e-6)


def test_trace_holds_what_torchtitan_logs_where_the_loss_is_known(paced):
    folder, by_rank = paced
    trace = read_trace(folder)
    assert trace.steps.tolist() == [1, 3, 6]
    for index, (step, steps_since) in enumerate([(1, 1), (3, 2), (6, 3)]):
        metrics, found = by_rank[1][step], trace.load(index).step_columns
        assert found["loss"] == metrics["loss_metrics/global_avg_loss"] > 0
        assert found["grad_norm"] == metrics["grad_norm"] == by_rank[0][step]["grad_norm"]
        assert found["tokens_per_second"] == pytest.approx(metrics["throughput(tps)"], rel=0.05)
        # torchtitan divides by log_freq also where fewer steps have passed.
        seconds = metrics["time_metrics/end_to_end(s)"] * 3 / steps_since
        assert found["step_seconds"] == pytest.approx(seconds, rel=0.05)
    assert by_rank[0][6]["loss_metrics/global_avg_loss"] < 0, "rank 0 does not know it"


def test_every_rank_logs_the_same_of_the_experts(paced):
    _folder, by_rank = paced
    for step in (1, 3, 6):
        mine, other = (
            {name: value for name, value in logged[step].items() if name.startswith("moe/")}
            for logged in by_rank
        )
        assert mine == other and len(mine) < 80
        assert sum("hottest" in name for name in mine) == 3 * 4


def test_a_trainer_that_attaches_the_balance_logs_the_same(ranks, tmp_path):
    flags = [*TINY, "--training.steps=2", "--debug.seed=1", f"--dump_folder={tmp_path}"]
    (described,), (alone,) = (ranks.run(1, train_and_log, flags, flag) for flag in (True, False))
    mine, other = (
        {name: value for name, value in logged[2].items() if name.startswith("moe/")}
        for logged in (described, alone)
    )
    assert mine == other and "moe/max_cum_overload_factor" in mine
    assert "moe/seq_load_balancing_loss" in mine


def test_negative_number_of_extreme_experts_is_refused():
    with pytest.raises(JobError, match="metrics.moe_extreme_experts is -1; it must be at least 0$"):
        job_config.load([*TINY, "--metrics.moe_extreme_experts=-1"])
