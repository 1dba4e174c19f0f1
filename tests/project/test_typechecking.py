"""Tests of torchtitan's SPMD type checker: it accepts the router with every loss on."""

from __future__ import annotations

import pytest

from tests.support.train_jobs import train

LOSSES = (
    '[{type="sequence_wise", weight=1e-3, count_from="scores"}, {type="global_batch", weight=1e-3}, '
    '{type="z_loss", weight=1e-3}]'
)
LAYOUTS = {
    "TP2": ["--parallelism.tensor_parallel_degree=2"],
    "EP2": ["--parallelism.data_parallel_shard_degree=2", "--parallelism.expert_parallel_degree=2"],
    "CP2": ["--parallelism.context_parallel_degree=2"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_types_hold(ranks, layout):
    arguments = [
        "--config",
        "deepseek_v3_tiny",
        f"--model.aux_losses={LOSSES}",
        "--training.steps=2",
        "--training.seq_len=256",
        "--debug.spmd_typechecking",
        *LAYOUTS[layout],
    ]
    by_rank = ranks.run(2, train, arguments)
    assert [len(logged) for logged in by_rank] == [2, 2]
    assert by_rank[0][1]["moe/global_load_balancing_loss"] >= 1.0
