"""Tests of the metrics that sinks get from a step: values by hand, and the number of names."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.synthetic_trace import run_info, step_loads
from titan_moe_lb.telemetry.sink_metrics import sink_metrics
from titan_moe_lb.traces.columns import Column
from titan_moe_lb.traces.step_load import StepLoad

COLUMNS = (
    Column("z_loss", is_aux_loss=True),
    Column("avg_overload_factor"),
    Column("max_overload_factor", summary="max"),
    Column("dropped", summary="sum"),
    Column("nowhere"),
    Column("max_cum_overload_factor", per="step"),
    Column("not_this_step", per="step"),
)
LOAD = StepLoad(
    layers=(1, 3),
    counts_ME=np.array([[4, 4, 4, 4], [8, 4, 4, 0]]),
    layer_columns={
        "z_loss": np.array([np.nan, 2.0]),
        "avg_overload_factor": np.array([1.0, 1.5]),
        "max_overload_factor": np.array([1.25, 2.0]),
        "dropped": np.array([3.0, 4.0]),
        "nowhere": np.array([np.nan, np.nan]),
    },
    step_columns={"max_cum_overload_factor": 1.75},
)


def test_by_hand():
    expected = {
        "max_violation": 0.5,
        "max_violation_p50": 0.5,
        "max_violation_p95": 0.95,
        "max_violation_max": 1.0,
        "coefficient_of_variation": np.sqrt(0.5) / 2,
        "coefficient_of_variation_p50": np.sqrt(0.5) / 2,
        "coefficient_of_variation_p95": np.sqrt(0.5) * 0.95,
        "coefficient_of_variation_max": np.sqrt(0.5),
        "normalized_entropy": (1 + 0.75) / 2,
        "dead_experts": 0.5,
        **dict.fromkeys(("z_loss", "z_loss_p50", "z_loss_p95", "z_loss_max"), 2.0),
        "avg_overload_factor": 1.25,
        "avg_overload_factor_p50": 1.25,
        "avg_overload_factor_p95": 1.475,
        "avg_overload_factor_max": 1.5,
        "max_overload_factor": 2.0,
        "max_overload_factor_p50": 1.625,
        "max_overload_factor_p95": 1.9625,
        "dropped": 7.0,
        "max_cum_overload_factor": 1.75,
    }
    metrics = sink_metrics(LOAD, COLUMNS)
    assert metrics == pytest.approx({f"moe/{name}": value for name, value in expected.items()})
    assert all(type(value) is float for value in metrics.values())


def test_every_layer_by_itself():
    metrics = sink_metrics(LOAD, COLUMNS, per_layer=True)
    assert metrics["moe/max_violation_layer_3"] == 1.0
    assert metrics["moe/avg_overload_factor_layer_1"] == 1.0
    assert metrics["moe/z_loss_layer_3"] == 2.0 and "moe/z_loss_layer_1" not in metrics


def test_hottest_and_coldest_experts_in_a_stable_order():
    metrics = sink_metrics(LOAD, COLUMNS, num_extreme_experts=2)
    found = [
        tuple(metrics[f"moe/{place}_{what}"] for what in ("load", "layer", "expert"))
        for place in ("hottest_1", "hottest_2", "coldest_1", "coldest_2")
    ]
    # Of the experts at balance the first is the second coldest, the last the second hottest.
    assert found == [(2, 3, 0), (1, 3, 2), (0, 3, 3), (1, 1, 0)]
    assert "moe/hottest_3_load" not in metrics


def test_number_of_names_does_not_grow_with_experts_or_layers():
    def names(num_layers, num_experts):
        info = run_info(num_layers, num_experts)
        load = next(step_loads(info, 1))
        return sink_metrics(load, info.columns, num_extreme_experts=4).keys()

    few, many = names(4, 8), names(61, 512)
    assert few == many and len(few) < 80
    extreme = {name for name in few if "hottest" in name or "coldest" in name}
    assert len(extreme) == 2 * 4 * 3


def test_more_extreme_experts_than_there_are():
    load = StepLoad(layers=(0,), counts_ME=np.array([[1, 2]]))
    metrics = sink_metrics(load, (), num_extreme_experts=9)
    assert sum(name.startswith("moe/hottest") for name in metrics) == 2 * 3


def test_model_without_moe_layers_has_none():
    assert sink_metrics(StepLoad(layers=(), counts_ME=np.zeros((0, 0))), COLUMNS) == {}
