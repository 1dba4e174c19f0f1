"""Tests with more experts than a byte can number."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.other_models import train_with_experts
from titan_moe_lb.traces.routing_trace import RoutingTrace
from titan_moe_lb.traces.trace import read_trace

NUM_EXPERTS, TOP_K = 320, 2


def test_320_experts_are_counted_recorded_and_shown_apart(ranks, tmp_path):
    flags = ["--module", "deepseek_v3", "--config", "deepseek_v3_tiny", "--training.steps=2"]
    flags += ["--training.local_batch_size=4", "--training.seq_len=128"]
    flags += [
        "--parallelism.data_parallel_shard_degree=2",
        "--parallelism.expert_parallel_degree=2",
    ]
    flags += ["--metrics.record_routing_steps", "1", "2", f"--dump_folder={tmp_path}"]
    logged = ranks.run(2, train_with_experts, NUM_EXPERTS, flags)[0]

    trace, routing = read_trace(tmp_path), RoutingTrace(tmp_path)
    assert trace.counts_SME.shape == (2, 3, NUM_EXPERTS)
    for index, step in enumerate(trace.steps):
        for m, layer in enumerate(trace.layers):
            # Each token's own record, which no counting has touched.
            ids = routing.expert_ids(int(step), layer)
            assert ids.shape == (8, 128, TOP_K) and ids.max() > 255
            expected_E = np.bincount(ids.ravel(), minlength=NUM_EXPERTS)
            assert (trace.counts_SME[index, m] == expected_E).all()
    counts_SME = trace.counts_SME
    violation_SM = counts_SME.max(axis=2) / counts_SME.mean(axis=2) - 1
    half_SMR = counts_SME.reshape(2, 3, 2, NUM_EXPERTS // 2).sum(axis=3)
    for step, metrics in enumerate(logged):
        assert metrics["moe/max_violation"] == pytest.approx(violation_SM[step].mean())
        overload_M = half_SMR[step].max(axis=1) / half_SMR[step].mean(axis=1)
        assert metrics["moe/max_overload_factor"] == pytest.approx(overload_M.max())
