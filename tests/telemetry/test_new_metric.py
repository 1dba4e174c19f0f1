"""Tests of a new metric: one file declares it, and it reaches the sinks, the trace and the
report."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from tests.support.synthetic_trace import run_info
from tests.support.telemetry_jobs import forward_and_backward, moe_layers
from titan_moe_lb import cli
from titan_moe_lb.balancing.step_hook import StepHook, wire
from titan_moe_lb.errors import JobError
from titan_moe_lb.parallel.rank_groups import RankGroups
from titan_moe_lb.telemetry.metrics import Metric
from titan_moe_lb.telemetry.reduction import reduce_step
from titan_moe_lb.telemetry.sink_metrics import sink_metrics
from titan_moe_lb.telemetry.trace_columns import columns_in, columns_of
from titan_moe_lb.traces.trace import TraceWriter, read_trace

FILE = """
import numpy as np

from titan_moe_lb.telemetry.metrics.base import Metric, Reduction


class HottestCount(Metric):
    name = "hottest_count"
    description = "Tokens of the fullest expert in the step."
    over_ranks = Reduction.MAX
    over_layers = Reduction.SUM

    def measure(self, step):
        return step.global_counts_NE.max(axis=1).astype(np.float64)
"""


@pytest.fixture
def new_metric(tmp_path, monkeypatch):
    """Write the file, and import it as ``telemetry/metrics/__init__.py`` imports those of the
    package."""
    monkeypatch.setattr(Metric, "kinds", dict(Metric.kinds))
    file = tmp_path / "hottest_count.py"
    file.write_text(FILE)
    spec = importlib.util.spec_from_file_location("hottest_count", file)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_a_metric_is_one_file_and_one_import(new_metric, tmp_path):
    layers = moe_layers([1, 2])
    hook = StepHook(layers, wire([layer.router for layer in layers], RankGroups()), RankGroups())
    forward_and_backward(layers)
    hook.close_step()
    load = reduce_step(layers, RankGroups())
    expected_M = load.counts_ME.max(axis=1)
    np.testing.assert_array_equal(load.layer_columns["hottest_count"], expected_M)
    assert sink_metrics(load, columns_in(load))["moe/hottest_count"] == expected_M.sum()

    columns = columns_of([layer.router.config for layer in layers])
    assert "hottest_count" in [column.name for column in columns]
    writer = TraceWriter(tmp_path, run_info(2, 8, columns=columns))
    writer.write(1, load)
    writer.close()
    assert read_trace(tmp_path).over_steps("hottest_count") == [expected_M.sum()]
    cli.main(["report", str(tmp_path)])
    page = (tmp_path / "report.html").read_text()
    assert "Hottest count" in page and "Tokens of the fullest expert in the step." in page


def test_a_metric_without_its_reduction_over_ranks_is_refused():
    with pytest.raises(JobError, match="over_ranks"):
        type("NoReduction", (Metric,), {"name": "no_reduction"})
    assert "no_reduction" not in Metric.kinds
