"""Tests of recorded and assumed loads: capacity, micro-batches, log-normal."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titan_moe_lb.costmodel.loads.lognormal import Overload, fitted_sigma, lognormal_loads
from titan_moe_lb.costmodel.loads.recorded import MOST_LOADS, RecordedLoads
from titan_moe_lb.costmodel.times.moe_layer import MoELayer
from titan_moe_lb.traces.capacity import (
    capacity_factor,
    non_blocking_capacity_factor,
    overrun_factor,
    worst_capacity_factor,
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 50), min_size=4, max_size=4), min_size=1, max_size=6),
    st.sampled_from([0.0, 0.01, 0.1, 0.5]),
)
def test_capacity_drops_what_it_may_and_no_smaller_one_does(rows, share):
    """The test counts dropped tokens one by one, from the loads alone."""
    received_MR = np.array([[*row, 51 * 4 - sum(row)] for row in rows])

    def dropped(factor: float) -> float:
        room = factor * received_MR.mean(axis=1, keepdims=True)
        return np.maximum(received_MR - room, 0).sum() / received_MR.sum()

    factor = float(capacity_factor(received_MR, share))
    assert dropped(factor) <= share + 1e-12
    assert factor == 0 or dropped(factor * (1 - 1e-6)) > share - 1e-9
    if share == 0:
        assert factor == (received_MR / received_MR.mean(axis=1, keepdims=True)).max()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 50), min_size=16, max_size=16), min_size=1, max_size=30),
    st.sampled_from([0.0, 0.1, 0.34, 0.5]),
    st.sampled_from([None, (0, 0), (0, 1)]),
)
def test_overruns_are_counted_one_by_one(rows, share, stages):
    """Two layers and 8 ranks; a micro-batch overruns where a rank's buffer is too small."""
    received_NMR = np.array(rows).reshape(-1, 2, 8).transpose(1, 0, 2)
    received_NMR[..., 0] += 1

    def overruns(factor: float) -> float:
        found = 0
        for m in range(received_NMR.shape[1]):
            layers = [received_NMR[0, m], received_NMR[1, m]]
            buffers = [layers[0] + layers[1]] if stages == (0, 0) else layers
            found += any(one.max() > factor * (one.sum() / 8) * (1 + 1e-12) for one in buffers)
        return found / received_NMR.shape[1]

    factor = overrun_factor(received_NMR, share, stages)
    assert overruns(factor) <= share + 1e-12
    assert factor == 1 or overruns(factor * (1 - 1e-9)) > share - 1e-12
    if share == 0:
        assert overruns(factor) == 0


def test_overruns_of_nothing_and_the_worst_case():
    assert overrun_factor(np.zeros((2, 3, 4), dtype=np.int64)) == 1.0
    assert worst_capacity_factor(num_experts=256, top_k=8, ep_degree=8) == 8
    assert worst_capacity_factor(num_experts=256, top_k=8, ep_degree=64) == 64 * 4 / 8


def test_capacity_of_layers_and_of_nothing():
    received = np.array([[[6, 2], [4, 4]], [[0, 0], [0, 0]]])
    assert capacity_factor(received).tolist() == [1.5, 1.0]
    # At balance, and on a rank alone, the room that loses 1 % is 1 % smaller.
    assert capacity_factor(np.full((3, 4), 7), 0.01).tolist() == pytest.approx(0.99)
    assert capacity_factor(np.array([[5], [9], [0]]), 0.01).tolist() == pytest.approx(0.99)
    # Of 16 tokens 2 are above the room of 4: an eighth. At a tenth 1.6 of them are let go.
    assert capacity_factor(received[:1], 0.125).tolist() == [1.0]
    assert capacity_factor(received[:1], 0.1).tolist() == [pytest.approx(1.1)]


def test_the_same_room_as_a_share_of_the_worst_case():
    """torchtitan's HybridEP buffer has tokens x EP x min(local experts, top_k) x its factor."""
    tokens, top_k = 1000, 8
    for experts, ep in ((256, 8), (64, 32)):
        share = non_blocking_capacity_factor(1.25, num_experts=experts, top_k=top_k, ep_degree=ep)
        room = tokens * ep * min(experts // ep, top_k) * share
        assert room == pytest.approx(1.25 * tokens * top_k)


def recorded(num_steps: int, num_micro_batches: int) -> RecordedLoads:
    """Record micro-batches of 40 of 400 routed tokens; expert 0 gets the number of its step."""
    step_S = np.arange(num_steps)
    counts = np.stack([step_S, 400 - step_S], axis=-1)[:, None]
    single = np.stack([step_S, 40 - step_S], axis=-1)[:, None][num_steps - num_micro_batches :]
    return RecordedLoads(
        counts_SME=counts,
        micro_batch_counts_SME=single,
        expert_groups=(),
        ep_degree=1,
        max_overload_factor=1.0,
    )


def test_micro_batches_of_the_size_that_is_planned():
    run = recorded(20, 20)
    last = slice(-4, None)
    assert run.micro_batches(last, 40)[:, 0, 0].tolist() == [16, 17, 18, 19]
    assert run.micro_batches(last, 10)[:, 0, 0].tolist() == [16, 17, 18, 19]
    assert run.micro_batches(last, 80)[:, 0, 0].tolist() == [16 + 17, 18 + 19]
    assert run.micro_batches(last, 1e6)[:, 0, 0].tolist() == [16 + 17 + 18 + 19]
    assert run.micro_batches(slice(0, 2), 40)[:, 0, 0].tolist() == [0, 1]
    assert len(recorded(400, 400).micro_batches(slice(0, None), 40)) <= MOST_LOADS
    assert run.known(last)[0].tolist() == [70, 1600 - 70]


def test_runs_that_recorded_micro_batches_in_part_or_not_at_all():
    part, none = recorded(20, 3), recorded(20, 0)
    assert part.micro_batches(slice(-4, None), 40)[:, 0, 0].tolist() == [17, 18, 19]
    assert part.micro_batches(slice(0, 2), 40)[:, 0, 0].tolist() == [17]
    assert not none.has_micro_batches
    assert none.micro_batches(slice(-4, None), 40)[:, 0, 1].tolist() == [384, 383, 382, 381]


@pytest.mark.parametrize("sigma", [0.0, 0.3, 0.7, 3.0])
def test_log_normal_loads_are_possible_ones(sigma):
    shares = lognormal_loads(sigma, num_layers=3, num_experts=64, top_k=6)
    assert shares.shape[1:] == (3, 64)
    assert shares.sum(axis=-1) == pytest.approx(np.ones(shares.shape[:2]))
    # A token takes an expert once.
    assert shares.max() <= 1 / 6 * (1 + 1e-9) and shares.min() >= 0
    again = lognormal_loads(sigma, num_layers=3, num_experts=64, top_k=6)
    assert (shares == again).all()
    if sigma < 1:  # what is cut off makes an extreme load more even than it was drawn
        logs = np.log(shares).std(axis=-1)
        assert logs.mean() == pytest.approx(sigma, rel=0.05, abs=1e-9)
        assert fitted_sigma(shares) == pytest.approx(sigma, rel=0.05, abs=1e-9)


def test_sigma_of_loads_that_are_known():
    """Two experts with 1.5 and 0.5 times the mean have a variance of 1/4, so sigma^2 = ln 1.25."""
    assert fitted_sigma(np.array([[30, 10], [10, 30]])) == pytest.approx(np.log(1.25) ** 0.5)


@pytest.mark.parametrize(("factor", "degree"), [(1.0, 8), (1.3, 16), (2.0, 32), (4.0, 64)])
def test_an_overload_factor_is_that_of_its_log_normal_loads(factor, degree):
    """The reference draws loads, and takes the busiest rank of each over the mean of the ranks."""
    layer = MoELayer(num_experts=128, top_k=8, dim=1, hidden_dim=1)
    spread = Overload(factor, degree).spread([layer] * 40)
    normal = np.random.default_rng(1).standard_normal((4000, degree, 128 // degree))
    of_ranks = np.exp(spread.sigma * normal).sum(axis=-1)
    found = (of_ranks.max(axis=-1) / of_ranks.mean(axis=-1)).mean()
    assert found == pytest.approx(factor, rel=0.02)
    assert spread.name == f"{factor:.2f}@{degree}"
