"""Tests of ``LoadTrace``: what any program writes reads back, with and without this package."""

from __future__ import annotations

import duckdb
import numpy as np
import polars
import pyarrow as pa
import pytest

import titan_moe_lb as lb
from titan_moe_lb.traces.balance_statistics import ABSENT

EVEN = {1: [4, 4, 4, 4], 3: [16, 0, 0, 0]}


def test_what_is_written_reads_back(tmp_path):
    with lb.LoadTrace(tmp_path, top_k=2, ep=2, micro_batches=2, model="mine") as trace:
        trace.write(10, EVEN, loss=2.5, router_time=[0.1, 0.2])
        trace.write(30, {3: np.array([0, 16.0, 0, 0]), 1: EVEN[1]}, loss=np.nan, router_time=[1, 2])
    found = lb.read_trace(tmp_path)
    assert isinstance(found, lb.Trace) and found.ended and not found.damage
    assert found.steps.tolist() == [10, 30] and found.layers == (1, 3)
    np.testing.assert_array_equal(found.counts_SME[0], list(EVEN.values()))
    np.testing.assert_array_equal(found.counts_SME[1, 1], [0, 16, 0, 0])
    np.testing.assert_array_equal(found.over_steps("loss"), [2.5, np.nan])
    np.testing.assert_array_equal(found.layer_columns["router_time"], [[0.1, 0.2], [1, 2]])
    # 16 copies of 8 tokens in two micro-batches of two ranks.
    assert (found.info.seq_len, found.info.global_batch_size, found.info.ep) == (4, 2, 2)


def test_layers_may_have_different_numbers_of_experts(tmp_path):
    with lb.LoadTrace(tmp_path, top_k=1) as trace:
        trace.write(1, {0: [1, 2], 1: [1, 1, 1]})
    found = lb.read_trace(tmp_path)
    assert found.counts_SME.tolist() == [[[1, 2, ABSENT], [1, 1, 1]]]
    assert found.info.num_experts_M.tolist() == [2, 3]


@pytest.mark.parametrize(
    ("step", "counts", "numbers", "named"),
    [
        (1, EVEN, {}, "step 1"),
        (2, {1: EVEN[1]}, {}, "layers"),
        (2, {}, {}, "step 2"),
        (2, {1: [0] * 4, 3: [0] * 4}, {}, "step 2"),
        (2, {1: [4, 4, 4, 6], 3: EVEN[3]}, {}, "layer 3"),
        (2, {1: [4, 4, 4], 3: EVEN[3]}, {}, "layer 1"),
        (2, {1: [4, 4, 4, 3], 3: EVEN[3]}, {}, "top_k"),
        (2, {1: [-4, 12, 4, 4], 3: EVEN[3]}, {}, "layer 1"),
        (2, {1: [0.5, 7.5, 4, 4], 3: EVEN[3]}, {}, "layer 1"),
        (2, {1: [np.nan, 8, 4, 4], 3: EVEN[3]}, {}, "layer 1"),
        (2, {1: ["a", 8, 4, 4], 3: EVEN[3]}, {}, "layer 1"),
        (2, {1: [[4, 4], [4, 4]], 3: EVEN[3]}, {}, "layer 1"),
        (2, EVEN, {"new": 1.0}, "new"),
        (2, EVEN, {"loss": [1.0, 2.0]}, "loss"),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value),
)
def test_wrong_steps_are_refused_and_the_others_are_kept(tmp_path, step, counts, numbers, named):
    with lb.LoadTrace(tmp_path, top_k=2) as trace:
        trace.write(1, EVEN, loss=1.0)
        with pytest.raises(lb.JobError, match=named):
            trace.write(step, counts, **numbers)
        trace.write(5, EVEN)
    assert lb.read_trace(tmp_path).steps.tolist() == [1, 5]


def test_dropped_tokens_may_break_the_sum(tmp_path):
    with lb.LoadTrace(tmp_path, top_k=2, drops_tokens=True) as trace:
        trace.write(1, {1: [4, 4, 4, 3]})
    assert lb.read_trace(tmp_path).counts_SME.sum() == 15


@pytest.mark.parametrize("name", ["top_k", "ep", "micro_batches"])
def test_sizes_are_from_one(tmp_path, name):
    with pytest.raises(lb.JobError, match=name):
        lb.LoadTrace(tmp_path, **{"top_k": 2, name: 0})


def test_a_program_that_resumes_continues_its_trace(tmp_path):
    for steps in ((1, 2, 3), (3, 4)):
        with lb.LoadTrace(tmp_path, top_k=2) as trace:
            for step in steps:
                trace.write(step, EVEN, loss=float(len(steps)))
    found = lb.read_trace(tmp_path)
    assert found.over_steps("loss").tolist() == [3, 3, 2, 2] and found.info.resumed_at == (3,)


def test_other_readers_need_nothing_of_ours(tmp_path):
    """Read the same numbers by pyarrow, polars and duckdb."""
    with lb.LoadTrace(tmp_path, top_k=2) as trace:
        for step in (1, 2):
            trace.write(step, EVEN, loss=3.0 - step)
    file = tmp_path / "moe_load.arrow"
    loads = pa.ipc.open_stream(pa.memory_map(str(file))).read_all()
    frame = polars.read_ipc_stream(file)
    ((total,),) = duckdb.sql("select sum(list_sum(counts)) from loads").fetchall()
    assert loads["step"].to_pylist() == frame["step"].to_list() == [1, 1, 2, 2]
    assert frame["counts"].to_list() == loads["counts"].to_pylist() == [*EVEN.values()] * 2
    assert total == 64 and frame["loss"].to_list() == [2.0, 2.0, 1.0, 1.0]
