"""Tests of layer numbers: telemetry and plan agree."""

from __future__ import annotations

import pytest
from torchtitan.models import deepseek_v3 as upstream

from model_registry.deepseek_v3 import tiny
from model_registry.deepseek_v3.config_registry import deepseek_v3_tiny
from titan_moe_lb.costmodel.jobs.read_job import read_job
from titan_moe_lb.resolved_job import Job
from titan_moe_lb.telemetry.describe_run import describe_run
from titan_moe_lb.wiring.model_spec import balanced


def job(dense: list[str]):
    """Build the tiny DeepSeek-V3 (4 layers, the first dense) with 2 MTP layers, some of them
    dense."""
    config = deepseek_v3_tiny()
    model = tiny("flex", "standard", num_mtp_layers=2)
    for name in dense:
        layers, number = name.split(".")
        block = getattr(model, layers)[int(number)]
        block.moe, block.feed_forward = None, model.layers[0].feed_forward
    spec = upstream.model_registry("debugmodel")
    spec.model = model
    config.model_spec = balanced(spec)
    return config


@pytest.mark.parametrize(
    ("dense", "numbers"),
    [
        ([], [1, 2, 3, 4, 5]),
        (["layers.3"], [1, 2, 4, 5]),
        (["layers.2", "layers.3", "mtp_layers.0"], [1, 4]),
    ],
)
def test_telemetry_and_plan_agree(ranks, dense, numbers):
    assert ranks.run(1, both, dense) == [(numbers, numbers, numbers)]


def both(dense: list[str]) -> tuple[list[int], list[int], list[int]]:
    """Return the layer numbers of the trace, of the plan, and of the plan's only stage."""
    traced = list(describe_run(Job.of(job(dense), 1)).layers)
    planned = read_job(Job.of(job(dense), 1))
    return traced, list(planned.moe_layers), list(planned.stages[0].moe_layers)
