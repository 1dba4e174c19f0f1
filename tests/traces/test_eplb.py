"""Tests of copies of hot experts: DeepSeek's EPLB by its published example, and invariants."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titan_moe_lb.errors import JobError
from titan_moe_lb.traces.eplb import eplb
from titan_moe_lb.traces.expert_order import contiguous, greedy, tokens_of_experts

LOADS = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
PLACED = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def test_the_example_of_its_readme():
    """github.com/deepseek-ai/EPLB: 12 experts in 4 groups, 16 slots, 2 nodes of 4 devices."""
    for load_E, expected in zip(LOADS, PLACED, strict=True):
        placed = eplb(np.array(load_E), num_slots=16, num_devices=8, num_nodes=2, num_groups=4)
        assert placed.ravel().tolist() == expected


loads = st.lists(st.integers(0, 1000), min_size=16, max_size=16).map(np.array)


@settings(max_examples=50, deadline=None)
@given(loads, st.sampled_from([1, 2, 4, 8]), st.integers(0, 4), st.sampled_from([1, 2]))
def test_what_always_holds(load_E, devices, copies_each, nodes):
    slots = 16 + copies_each * devices
    placed = eplb(
        load_E, num_slots=slots, num_devices=devices, num_nodes=min(nodes, devices), num_groups=4
    )
    assert placed.shape == (devices, slots // devices)
    count = Counter(placed.ravel().tolist())
    assert set(count) == set(range(16)) and count.total() == slots
    # Copies share the tokens of their expert, and none is lost.
    tokens = tokens_of_experts(load_E, placed, 1000.0)
    assert tokens.sum() == pytest.approx(1000.0)
    for expert in range(16):
        mine = tokens[placed == expert]
        assert mine == pytest.approx(np.full(len(mine), mine[0]))
    # Where each group stays: with nodes, one group is on one.
    if nodes == 2 and devices > 1:
        for group in range(4):
            on = np.isin(placed, np.arange(4 * group, 4 * group + 4)).any(axis=1)
            assert on[: devices // 2].any() != on[devices // 2 :].any()


@settings(max_examples=30, deadline=None)
@given(loads, st.sampled_from([1, 2, 4, 8, 16]))
def test_without_copies_it_is_the_greedy_placement(load_E, devices):
    placed = eplb(load_E, num_slots=16, num_devices=devices)
    assert (placed == greedy(load_E, devices)).all()


def test_copies_help_where_moving_cannot():
    """One expert has half of the load: only a copy can lower the load of its device."""
    load_E = np.array([70, 10, 10, 10, 10, 10, 10, 10])

    def fullest(placed: np.ndarray) -> float:
        return tokens_of_experts(load_E, placed, 140.0).sum(axis=1).max()

    assert fullest(contiguous(8, 4)) == fullest(greedy(load_E, 4)) == 80
    # 12 slots: the hot expert has five of 14 tokens, each other one 10, three in a device.
    assert fullest(eplb(load_E, num_slots=12, num_devices=4)) == 38


def test_groups_that_nodes_do_not_divide_are_placed_globally():
    load_E = np.array(LOADS[0])
    freely = eplb(load_E, num_slots=16, num_devices=8)
    assert (eplb(load_E, num_slots=16, num_devices=8, num_nodes=2, num_groups=3) == freely).all()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_slots": 8, "num_devices": 4}, "8 slots cannot hold 12 experts on 4 devices"),
        ({"num_slots": 14, "num_devices": 4}, "take a multiple of 4 that is at least 12"),
        ({"num_slots": 16, "num_devices": 8, "num_groups": 5}, "12 experts in 5 groups"),
    ],
)
def test_sizes_that_do_not_divide(sizes, message):
    with pytest.raises(JobError, match=message):
        eplb(np.array(LOADS[0]), **sizes)
