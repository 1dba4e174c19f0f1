"""Tests of the routing trace: any layout's trace gives back the global batch, or is refused."""

from __future__ import annotations

import re

import numpy as np
import pyarrow as pa
import pytest

from tests.support.synthetic_trace import run_info
from titan_moe_lb.errors import JobError
from titan_moe_lb.traces.routing_trace import RoutingTrace, RoutingTraceWriter, open_routing_trace

SEQUENCES, LENGTH, TOP_K = 8, 16, 2


def info_of(world_size, num_experts=8):
    return run_info(
        2, num_experts, TOP_K, world_size=world_size, global_batch_size=SEQUENCES, seq_len=LENGTH
    )


def routed(step, layer, num_experts=8):
    """Make the expert ids of the global batch, as the reference."""
    random = np.random.default_rng([step, layer])
    return random.integers(0, num_experts, (SEQUENCES, LENGTH, TOP_K))


def head_and_tail(rank, degree):
    """Positions of a context-parallel rank: a slice from the start and its mirror image."""
    size = LENGTH // (2 * degree)
    return [(rank * size, size), ((2 * degree - 1 - rank) * size, size)]


def one_process():
    return [(0, first, 2, [(0, LENGTH)]) for first in range(0, SEQUENCES, 2)]


def data_parallel_with_accumulation():
    """Write two ranks with two passes of two sequences each, in micro-batches of one."""
    return [
        (rank, accumulation * 4 + rank * 2 + micro_batch, 1, [(0, LENGTH)])
        for rank in range(2)
        for accumulation in range(2)
        for micro_batch in range(2)
    ]


def context_parallel():
    return [
        (rank, first, 4, head_and_tail(rank, 2)) for rank in range(2) for first in range(0, 8, 4)
    ]


def tensor_parallel_sees_the_same_tokens():
    return [(rank, 0, SEQUENCES, [(0, LENGTH)]) for rank in range(2)]


def sequence_parallel():
    return [(rank, 0, SEQUENCES, [(rank * 4, 4)]) for rank in range(4)]


CUTS = {
    cut.__name__: cut()
    for cut in (
        one_process,
        data_parallel_with_accumulation,
        context_parallel,
        tensor_parallel_sees_the_same_tokens,
        sequence_parallel,
    )
}


def record(folder, cut, steps=(3, 7), num_experts=8, world_size=None):
    ranks = sorted({rank for rank, *_rest in cut})
    info = info_of(world_size or len(ranks), num_experts)
    for rank in ranks:
        writer = RoutingTraceWriter(folder, info, rank)
        for step in steps:
            for owner, first, count, token_slices in cut:
                for layer in info.layers if owner == rank else ():
                    ids_BLK = routed(step, layer, num_experts)[first : first + count]
                    local = [ids_BLK[:, start : start + n] for start, n in token_slices]
                    writer.write(
                        step=step,
                        layer=layer,
                        first_sequence=first,
                        token_slices=token_slices,
                        expert_ids_BLK=np.concatenate(local, axis=1),
                    )
        writer.close()
    return folder


@pytest.mark.parametrize("name", CUTS)
def test_global_batch_comes_back_from_every_layout(name, tmp_path):
    trace = RoutingTrace(record(tmp_path, CUTS[name]))
    assert trace.steps == (3, 7) and trace.layers == (1, 2)
    for step in trace.steps:
        for layer in trace.layers:
            found = trace.expert_ids(step, layer)
            np.testing.assert_array_equal(found, routed(step, layer))
            part = trace.expert_ids(step, layer, range(3, 6))
            np.testing.assert_array_equal(part, routed(step, layer)[3:6])


@pytest.mark.parametrize(
    "num_experts, dtype, size", [(2, "uint8", 1), (256, "uint8", 1), (257, "uint16", 2)]
)
def test_smallest_type_that_holds_the_ids(num_experts, dtype, size, tmp_path):
    folder = record(tmp_path, CUTS["one_process"], num_experts=num_experts)
    trace = RoutingTrace(folder / "routing")
    assert trace.expert_ids(3, 1).dtype == dtype
    np.testing.assert_array_equal(trace.expert_ids(3, 1), routed(3, 1, num_experts))


def refused(folder, step=3, layer=1, sequences=None):
    with pytest.raises(JobError) as error:
        RoutingTrace(folder).expert_ids(step, layer, sequences)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_rank_is_named_unless_its_part_is_not_asked_for(tmp_path):
    record(tmp_path, CUTS["data_parallel_with_accumulation"])
    (tmp_path / "routing" / "rank_00001.arrow").unlink()
    said = refused(tmp_path)
    for found in ("64 tokens", "step 3, layer 1", "sequence 2, position 0", "rank 1"):
        assert found in said
    np.testing.assert_array_equal(
        RoutingTrace(tmp_path).expert_ids(3, 1, range(0, 2)), routed(3, 1)[:2]
    )


def test_tensor_parallel_copy_may_be_missing(tmp_path):
    record(tmp_path, CUTS["tensor_parallel_sees_the_same_tokens"])
    (tmp_path / "routing" / "rank_00000.arrow").unlink()
    np.testing.assert_array_equal(RoutingTrace(tmp_path).expert_ids(7, 2), routed(7, 2))


def test_cut_file_gives_the_whole_steps_and_refuses_the_torn_one(tmp_path):
    record(tmp_path, CUTS["context_parallel"])
    file = tmp_path / "routing" / "rank_00001.arrow"
    file.write_bytes(file.read_bytes()[:-20])
    np.testing.assert_array_equal(RoutingTrace(tmp_path).expert_ids(3, 1), routed(3, 1))
    said = refused(tmp_path, step=7, layer=2)
    assert "rank_00001.arrow" in said and "sequence 4, position 4" in said


def test_damage_in_the_middle_leaves_the_other_steps(tmp_path):
    record(tmp_path, CUTS["context_parallel"], steps=(3, 7, 9))
    file = tmp_path / "routing" / "rank_00001.arrow"
    content = bytearray(file.read_bytes())
    starts = [at for at in range(0, len(content), 8) if content[at : at + 4] == b"\xff" * 4]
    # The schema, four messages a step (two layers, two forwards each), and the end mark.
    assert len(starts) == 1 + 3 * 4 + 1
    content[starts[5] : starts[5] + 64] = bytes(64)
    file.write_bytes(content)
    for step in (3, 9):
        np.testing.assert_array_equal(RoutingTrace(tmp_path).expert_ids(step, 2), routed(step, 2))
    assert "rank_00001.arrow" in refused(tmp_path, step=7, layer=1)


def test_expert_that_does_not_exist_is_refused(tmp_path):
    record(tmp_path, CUTS["one_process"], steps=(3,))
    file = tmp_path / "routing" / "rank_00000.arrow"
    ids = routed(3, 1)[:2].astype(np.uint8).tobytes()
    content = file.read_bytes()
    assert content.count(ids) == 1
    file.write_bytes(content.replace(ids, b"\xc8" + ids[1:]))
    said = refused(tmp_path)
    assert "expert 200 of 8" in said and "step 3, layer 1" in said


def test_each_file_is_opened_once_in_a_process(tmp_path, monkeypatch):
    record(tmp_path, CUTS["sequence_parallel"])
    opened, memory_map = [], pa.memory_map
    monkeypatch.setattr(pa, "memory_map", lambda path: opened.append(path) or memory_map(path))
    for folder in (tmp_path, str(tmp_path), tmp_path / "routing"):
        trace = open_routing_trace(folder)
        for step, layer in ((3, 1), (7, 2), (3, 1)):
            np.testing.assert_array_equal(trace.expert_ids(step, layer), routed(step, layer))
    assert len(opened) == len(set(opened)) == 4
    record(tmp_path, CUTS["sequence_parallel"], steps=(3, 7, 9))
    assert open_routing_trace(tmp_path).steps == (3, 7, 9), "another recording, the same folder"


def test_damaged_bytes_are_never_a_traceback(tmp_path):
    record(tmp_path, CUTS["context_parallel"])
    file = tmp_path / "routing" / "rank_00001.arrow"
    content = file.read_bytes()
    random = np.random.default_rng(0)
    for _ in range(400):
        array = np.frombuffer(content, dtype=np.uint8).copy()
        array[random.integers(0, len(array), size=2)] = random.integers(0, 256, size=2)
        file.write_bytes(array.tobytes())
        try:
            trace = RoutingTrace(tmp_path)
            for step in trace.steps:
                trace.expert_ids(step, 1)
        except JobError as error:
            assert "\n" not in str(error)


def test_unknown_step_names_the_recorded_ones(tmp_path):
    record(tmp_path, CUTS["one_process"])
    assert re.search(r"step 4\b.* 3, 7", refused(tmp_path, step=4))


def test_ranks_that_disagree_are_refused(tmp_path):
    record(tmp_path, CUTS["one_process"], steps=(3,), world_size=2)
    writer = RoutingTraceWriter(tmp_path, info_of(2), rank=1)
    writer.write(
        step=3,
        layer=1,
        first_sequence=0,
        token_slices=[(0, LENGTH)],
        expert_ids_BLK=(routed(3, 1)[:1] + 1) % 8,
    )
    assert "step 3, layer 1" in refused(tmp_path)


def test_two_layouts_in_one_folder_are_refused(tmp_path):
    record(tmp_path, CUTS["sequence_parallel"])
    record(tmp_path, CUTS["context_parallel"])
    with pytest.raises(JobError, match=r"rank_\d+\.arrow and rank_\d+\.arrow"):
        RoutingTrace(tmp_path)


def test_resumed_run_replaces_the_steps_that_it_repeats(tmp_path):
    record(tmp_path, CUTS["context_parallel"], steps=(3, 7))
    record(tmp_path, CUTS["context_parallel"], steps=(7, 9))
    trace = RoutingTrace(tmp_path)
    assert trace.steps == (3, 7, 9)
    for step in trace.steps:
        np.testing.assert_array_equal(trace.expert_ids(step, 2), routed(step, 2))


def test_folder_without_routing_and_ids_of_wrong_shape(tmp_path):
    with pytest.raises(JobError, match=str(tmp_path)):
        RoutingTrace(tmp_path)
    writer = RoutingTraceWriter(tmp_path, info_of(1), rank=0)
    with pytest.raises(ValueError, match=r"are not \(B, 16, 2\)"):
        writer.write(
            step=1,
            layer=1,
            first_sequence=0,
            token_slices=[(0, LENGTH)],
            expert_ids_BLK=np.zeros((2, LENGTH, 3), dtype=np.int64),
        )
