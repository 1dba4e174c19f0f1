"""Tests of the cost model's formulas, against exact rationals, properties and torchtitan's
modules."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torchtitan.models.common.moe import GroupedExperts
from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

from benchmarks.host_hardware import as_toml, measure_host
from tests.support.memory_jobs import LiveBytes
from titan_moe_lb.commands.plan.known_hardware import hardware, known_hardware
from titan_moe_lb.costmodel import all_to_all_time, expert_load, receiver_skew
from titan_moe_lb.costmodel.hardware.device import SPECS, Hardware, Host
from titan_moe_lb.costmodel.times.activation import (
    bytes_of_combine,
    bytes_of_exchanges,
    bytes_per_received_token,
    largest_that_fits,
    working_bytes_per_received_token,
)
from titan_moe_lb.costmodel.times.dispatch import exchange_time
from titan_moe_lb.costmodel.times.gemm import gemm_time
from titan_moe_lb.costmodel.times.layer import (
    measured_layer_time,
    two_level_layer_time,
    two_level_load,
)
from titan_moe_lb.costmodel.times.moe_layer import MoELayer, RankRole
from titan_moe_lb.costmodel.times.step import makespan
from titan_moe_lb.errors import JobError
from titan_moe_lb.parallel.schedules import one_forward_one_backward
from titan_moe_lb.traces.expert_order import contiguous, greedy, tokens_of_experts

DEVICE = Hardware(
    name="round numbers",
    bf16_flops=1e12,
    memory_bytes=1e9,
    memory_bandwidth=1e12,
    scale_up_domain=4,
    scale_up_bandwidth=1e9,
    scale_up_latency=1e-6,
    scale_out_bandwidth=1e8,
    scale_out_latency=1e-5,
)


# A shared machine makes single examples slow, which is no failure.
unhurried = settings(deadline=None)


@st.composite
def routings(draw):
    """Generate experts, top_k, hot experts, EP degree, and the imbalance as an exact share of its
    range."""
    experts = draw(st.integers(1, 300))
    k = draw(st.integers(1, min(experts, 16)))
    hot = draw(st.integers(1, k))
    degree = draw(st.integers(1, 400))
    share = draw(st.fractions(0, 1, max_denominator=64))
    return experts, k, hot, degree, 1 + share * (Fraction(experts, k) - 1)


def exact(experts: int, k: int, hot: int, degree: int, factor: Fraction):
    """Exact load of a hot expert, of another expert and of the busiest device, over the mean of an
    expert."""
    others = experts - hot
    rest = (experts - hot * factor) / others if others else factor
    on_device = max(1, -(-experts // degree))
    hot_on_device = min(hot, on_device)
    return factor, rest, hot_on_device * factor + (on_device - hot_on_device) * rest


@unhurried
@given(routings())
def test_skew_is_the_busiest_devices_load_over_the_mean(routing):
    experts, k, hot, degree, factor = routing
    _hot, _rest, busiest = exact(*routing)
    skew = receiver_skew(
        num_experts=experts,
        top_k=k,
        ep_degree=degree,
        imbalance_factor=float(factor),
        num_hot_experts=hot,
    )
    expected = 1 if degree == 1 else min(factor, max(1, busiest * degree / experts))
    assert skew == pytest.approx(float(expected), rel=1e-9)
    assert 1 <= skew <= experts / k * (1 + 1e-12)
    if degree > 1 and experts % degree == 0:
        # The bound is about degrees that do not divide the experts: here it never binds.
        assert skew == pytest.approx(float(busiest * degree / experts), rel=1e-9)


@unhurried
@given(routings(), st.integers(1, 4096))
def test_tokens_are_conserved(routing, tokens):
    experts, k, hot, degree, factor = routing
    load = expert_load(
        num_experts=experts,
        top_k=k,
        num_tokens=tokens,
        imbalance_factor=float(factor),
        num_hot_experts=hot,
        ep_degree=degree,
    )
    total = hot * load.hot_tokens + (experts - hot) * load.remaining_tokens
    assert total == pytest.approx(tokens * k, rel=1e-9)
    # A token selects an expert at most once.
    assert load.hot_tokens <= tokens * (1 + 1e-9)
    assert load.remaining_tokens >= 0


@unhurried
@given(routings(), st.integers(1, 20))
def test_balance_has_no_skew_at_any_number_of_tokens(routing, tokens):
    experts, k, hot, degree, _factor = routing
    assert receiver_skew(
        num_experts=experts, top_k=k, ep_degree=degree, imbalance_factor=1.0, num_hot_experts=hot
    ) == pytest.approx(1.0)
    load = expert_load(
        num_experts=experts,
        top_k=k,
        num_tokens=tokens,
        imbalance_factor=1.0,
        num_hot_experts=hot,
        ep_degree=degree,
    )
    assert load.hot_tokens == pytest.approx(load.remaining_tokens)


@unhurried
@given(routings(), st.fractions(0, 1, max_denominator=64))
def test_skew_does_not_fall_as_imbalance_or_hot_experts_rise(routing, share):
    experts, k, hot, degree, factor = routing
    sizes = {"num_experts": experts, "top_k": k, "ep_degree": degree}
    more = factor + share * (Fraction(experts, k) - factor)
    at = receiver_skew(**sizes, imbalance_factor=float(factor), num_hot_experts=hot)
    above = receiver_skew(**sizes, imbalance_factor=float(more), num_hot_experts=hot)
    assert above >= at * (1 - 1e-9)
    assume(hot < k)
    hotter = receiver_skew(**sizes, imbalance_factor=float(factor), num_hot_experts=hot + 1)
    assert hotter >= at * (1 - 1e-9)


def test_skew_examples():
    """256 experts, top 8, EP 8: a device has 32 experts; 1 hot expert has T tokens, the other 255
    have 7T/255."""
    assert receiver_skew(num_experts=256, top_k=8, ep_degree=8) == pytest.approx(
        (1 + 31 * 7 / 255) / (8 / 8)
    )
    # Four hot experts of 4 times the mean: (16 + 28 * 240 / 252) / 32.
    assert receiver_skew(
        num_experts=256, top_k=8, ep_degree=8, imbalance_factor=4.0, num_hot_experts=4
    ) == pytest.approx(4 / 3)
    # EP 3 of 10 experts: a device holds 4, so T/2 K + 3 T/18 K of a mean of T/3 K.
    assert receiver_skew(num_experts=10, top_k=2, ep_degree=3) == pytest.approx(2.0)


def test_more_devices_than_experts_still_work():
    load = expert_load(num_experts=8, top_k=2, num_tokens=1, imbalance_factor=1.0, ep_degree=64)
    hot, hot_rows, others, _rows = load.gemms()
    assert (hot, hot_rows, others) == (1, 1, 0)
    assert receiver_skew(
        num_experts=8, top_k=2, ep_degree=64, imbalance_factor=3.0
    ) == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(64, (1, 64, 255, math.ceil(64 * 7 / 255))), (1, (1, 1, 7, 1))],
    ids=["dense", "fewer tokens than experts"],
)
def test_gemms_of_the_busiest_device(tokens, expected):
    """256 experts, top 8, one of them hot, no EP: one token activates 8 experts, not 256."""
    assert expert_load(num_experts=256, top_k=8, num_tokens=tokens).gemms() == expected


def test_whole_loads_are_not_rounded_up():
    """3 x 64 x 8 / 256 is 6, despite floating-point rounding."""
    for factor in np.linspace(1, 32, 32):
        load = expert_load(num_experts=256, top_k=8, num_tokens=64, imbalance_factor=factor)
        assert load.gemms()[1] == round(factor * 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"imbalance_factor": 0.5}, "imbalance_factor 0.5 is outside [1, 4]"),
        ({"imbalance_factor": 4.5}, "imbalance_factor 4.5 is outside [1, 4]"),
        ({"imbalance_factor": float("nan")}, "imbalance_factor nan is outside [1, 4]"),
        ({"imbalance_factor": np.array([1.0, 9.0])}, "imbalance_factor 9 is outside [1, 4]"),
        ({"num_hot_experts": 0}, "num_hot_experts 0 must be a whole number of at least 1"),
        ({"num_hot_experts": 3}, "num_hot_experts 3 is outside [1, 2]"),
        ({"num_hot_experts": 1.5}, "num_hot_experts 1.5 must be a whole number"),
        ({"num_experts": 0}, "num_experts 0 must be a whole number of at least 1"),
        ({"top_k": 0}, "top_k 0 must be a whole number of at least 1"),
        ({"top_k": 9}, "top_k 9 exceeds the 8 experts"),
        ({"ep_degree": 0}, "ep_degree 0 must be a whole number of at least 1"),
    ],
)
def test_arguments_outside_their_range(arguments, message):
    sizes = {"num_experts": 8, "top_k": 2, "ep_degree": 2, **arguments}
    for function, more in ((receiver_skew, {}), (expert_load, {"num_tokens": 16})):
        with pytest.raises(JobError) as error:
            function(**sizes, **more)
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def test_a_sweep_equals_single_calls():
    """Arrays broadcast, and each point equals a call with numbers."""
    random = np.random.default_rng(0)
    degree = 2 ** random.integers(0, 8, 2000)
    hot = random.integers(1, 9, 2000)
    factor = random.uniform(1, 32, 2000)
    tokens = random.integers(1, 100_000, 2000)
    sizes = {"num_experts": 256, "top_k": 8}
    skew = receiver_skew(**sizes, ep_degree=degree, imbalance_factor=factor, num_hot_experts=hot)
    load = expert_load(
        **sizes, num_tokens=tokens, ep_degree=degree, imbalance_factor=factor, num_hot_experts=hot
    )
    for i in range(0, 2000, 40):
        _hot, rest, busiest = exact(256, 8, int(hot[i]), int(degree[i]), Fraction(factor[i]))
        mean = tokens[i] * 8 / 256
        assert skew[i] == pytest.approx(
            1.0 if degree[i] == 1 else float(busiest) * degree[i] / 256, rel=1e-9
        )
        assert load.remaining_tokens[i] == pytest.approx(float(rest) * mean, rel=1e-6, abs=1e-6)
        assert load.tokens_on_device[i] == pytest.approx(float(busiest) * mean, rel=1e-9)


def test_all_to_all_is_bandwidth_or_latency():
    time = all_to_all_time(num_bytes=1e6, ep_degree=4, bandwidth=1e9, latency=1e-6, skew=2.0)
    assert time == pytest.approx(2e-3)
    assert all_to_all_time(num_bytes=8, ep_degree=4, bandwidth=1e9, latency=1e-6) == pytest.approx(
        3e-6
    )
    assert all_to_all_time(num_bytes=1e6, ep_degree=1, bandwidth=1e9) == 0


def test_all_to_all_over_nodes_waits_for_the_slower_links():
    """8 ranks in domains of 4: 3 of 7 peers are near, at 1 GB/s, and 4 are far, at 0.1 GB/s."""
    assert DEVICE.all_to_all_time(num_bytes=7e6, ep_degree=8) == pytest.approx(4e6 / 1e8)
    assert DEVICE.all_to_all_time(num_bytes=7e6, ep_degree=4) == pytest.approx(7e-3)
    latency = DEVICE.all_to_all_time(num_bytes=1, ep_degree=8)
    assert latency == pytest.approx(3 * 1e-6 + 4 * 1e-5)


@pytest.mark.parametrize(("experts", "top_k"), [(16, 2), (64, 6), (32, 4), (64, 8)])
@pytest.mark.parametrize("neighbouring", [False, True])
def test_deepep_sends_a_token_to_every_place_once(experts, top_k, neighbouring):
    """8 ranks in domains of 4 are compared with tokens that are dealt or drawn one by one."""
    tokens = 4096 * 3
    if neighbouring:
        chosen = np.arange(tokens * top_k).reshape(tokens, top_k) % experts
    else:
        # K choices of their own, as the formula takes them: not of different experts.
        chosen = np.random.default_rng(0).integers(experts, size=(tokens, top_k))
    seconds = []
    for ranks, bandwidth in ((8, DEVICE.scale_up_bandwidth), (2, DEVICE.scale_out_bandwidth)):
        place = chosen // (experts // ranks)
        different = np.mean([len(set(row)) for row in place.tolist()])
        # Of the places that it goes to over these links, it is itself in one of 4, or of 2.
        stays = 1 / min(ranks, 4)
        seconds.append(1000 * different * (1 - stays) * 64 * 2 / bandwidth)
    layer = MoELayer(
        num_experts=experts,
        top_k=top_k,
        dim=64,
        hidden_dim=1,
        neighbouring_choices=neighbouring,
    )
    role = RankRole(tokens_per_rank=1000, ep_degree=8, dispatcher="deepep")
    found = exchange_time(layer, role, DEVICE, skew=1.0)
    assert found == pytest.approx(max(seconds), rel=1e-9 if neighbouring else 0.01)


def test_moved_values_of_dispatchers_and_biases():
    """64 tokens go to 2 experts each, with D 64 and F 32, without imbalance."""
    plain = {"num_experts": 16, "top_k": 2, "dim": 64, "hidden_dim": 32}
    of_received, of_received_deepep = 4 * 64 + 3 * 32, 5 * 64 + 3 * 32
    for layer, dispatcher, degree, values in (
        (MoELayer(**plain), "standard", 2, of_received + 5 * 64),
        # torchtitan's deepep.py: in serving the rows come in order and are weighted (2 D); in
        # training they are gathered (2 D), weighted and added to the tokens that came (3 D).
        (MoELayer(**plain), "low_latency", 2, 2 * 64 + 3 * 32),
        (MoELayer(**plain), "deepep", 2, of_received_deepep),
        # gpt_oss/moe.py: a bias is written out, and read, added and written with the result.
        (
            MoELayer(**plain, expert_biases=True),
            "deepep",
            2,
            of_received_deepep + 4 * (2 * 32 + 64),
        ),
        # Without EP both are planned as LocalTokenDispatcher: gathered in the order of the
        # experts (2 D), weighted in float32 and added where they came from (3 D).
        (MoELayer(**plain), "standard", 1, 3 * 32 + 5 * 64),
        (MoELayer(**plain), "deepep", 1, 3 * 32 + 5 * 64),
    ):
        placement = RankRole(tokens_per_rank=64, ep_degree=degree, dispatcher=dispatcher)
        load = two_level_load(layer, placement, 1.0)
        time = two_level_layer_time(layer, placement, DEVICE, load)
        assert time.movement == pytest.approx(64 * 2 * values * 2 / DEVICE.memory_bandwidth)


def test_gemm_is_arithmetic_or_memory():
    assert (DEVICE.bf16_flops, DEVICE.memory_bandwidth) == (1e12, 1e12)
    assert gemm_time(1000, 1000, 1000, DEVICE) == pytest.approx(2e9 / 1e12)
    one_row = gemm_time(1, 1000, 1000, DEVICE)
    assert one_row == pytest.approx(2 * (1000 + 1e6 + 1000) / 1e12)
    assert gemm_time(0, 1000, 1000, DEVICE) == 0


LAYER = MoELayer(num_experts=16, top_k=2, dim=64, hidden_dim=32, shared_hidden_dim=32)


@pytest.mark.parametrize("degree", [1, 2, 4, 16])
@pytest.mark.parametrize(("factor", "hot"), [(1.0, 1), (2.0, 2), (4.0, 1), (8.0, 2)])
def test_measured_load_of_two_levels_is_the_analytic_one(degree, factor, hot):
    placement = RankRole(tokens_per_rank=1680, ep_degree=degree)
    mean = placement.tokens * 2 / 16
    rest = (placement.tokens * 2 - hot * factor * mean) / (16 - hot)
    counts_E = np.full(16, rest)
    counts_E[:hot] = factor * mean
    tokens_dn = tokens_of_experts(counts_E, contiguous(16, degree), placement.tokens * 2)
    measured = measured_layer_time(LAYER, placement, DEVICE, tokens_dn)
    load = two_level_load(LAYER, placement, factor, hot)
    analytic = two_level_layer_time(LAYER, placement, DEVICE, load)
    for part in ("router", "dispatch", "experts", "combine", "shared_experts"):
        assert getattr(measured, part) == pytest.approx(getattr(analytic, part), rel=1e-9)


@unhurried
@given(st.lists(st.integers(0, 1000), min_size=16, max_size=16), st.sampled_from([1, 2, 4, 8, 16]))
def test_greedy_placement_holds_every_expert_once(counts, degree):
    placed = greedy(np.array(counts), degree)
    assert sorted(placed.flatten().tolist()) == list(range(16))
    assert placed.shape == (degree, 16 // degree)


def test_greedy_placement_separates_the_hot_experts():
    counts_E = np.array([9, 9, 1, 1, 1, 1, 1, 1])
    load_d = counts_E[greedy(counts_E, 2)].sum(axis=1)
    assert load_d.tolist() == [12, 12]
    assert counts_E[contiguous(8, 2)].sum(axis=1).tolist() == [20, 4]


def test_experts_keep_what_the_formula_says():
    """The reference is autograd's record of the tensors that torchtitan's grouped experts save."""
    rows, dim, hidden = 256, 64, 48
    experts = _grouped_experts(dim, hidden, num_experts=4)
    x_RD = torch.randn(rows, dim, dtype=torch.bfloat16, requires_grad=True)
    saved = _saved_bytes(lambda: experts(x_RD, torch.tensor([100, 0, 56, 100])))
    weights = sum(parameter.nbytes for parameter in experts.parameters())
    layer = MoELayer(num_experts=4, top_k=1, dim=dim, hidden_dim=hidden)
    assert saved - weights == rows * bytes_per_received_token(layer)


@pytest.mark.parametrize(("dim", "hidden"), [(128, 256), (256, 64)])
def test_backward_of_experts_needs_what_the_formula_says(dim, hidden):
    """The reference is the peak of live storages while torchtitan's grouped experts run each
    operation."""
    rows = 16384
    experts = _grouped_experts(dim, hidden, num_experts=1)
    with LiveBytes([]) as account:
        x_RD = torch.randn(rows, dim, dtype=torch.bfloat16, requires_grad=True)
        out_RD = experts(x_RD, torch.tensor([rows]))
        out_RD.backward(torch.ones_like(out_RD))
    layer = MoELayer(num_experts=1, top_k=1, dim=dim, hidden_dim=hidden)
    # In a layer the combine consumes the result; here the test itself holds it.
    needed = account.most - rows * 2 * dim
    expected = bytes_per_received_token(layer) + working_bytes_per_received_token(layer)
    # The gradients of the weights are there as well.
    assert needed == pytest.approx(rows * expected, rel=0.04)


def _grouped_experts(dim: int, hidden: int, num_experts: int) -> GroupedExperts:
    experts = GroupedExperts.Config(dim=dim, hidden_dim=hidden, num_experts=num_experts).build()
    for parameter in experts.bfloat16().parameters():
        torch.nn.init.normal_(parameter)
    return experts


def test_combine_keeps_what_the_formula_says():
    """The routed results are in float32, by autograd's record of torchtitan's local dispatcher."""
    tokens, k, dim = 64, 2, 32
    dispatcher = LocalTokenDispatcher.Config(num_experts=4, top_k=k).build()
    ids = torch.arange(tokens * k).reshape(tokens, k) % 4
    x_TD = torch.randn(tokens, dim, dtype=torch.bfloat16, requires_grad=True)
    scores = torch.rand(tokens, k, requires_grad=True)
    routed, _counts, metadata = dispatcher.dispatch(
        x_TD, scores, ids, torch.bincount(ids.flatten())
    )
    routed = routed.detach().requires_grad_()
    saved = _saved_bytes(lambda: dispatcher.combine(routed, metadata, x_TD), (tokens * k, dim))
    layer = MoELayer(num_experts=4, top_k=k, dim=dim, hidden_dim=1)
    for name in ("standard", "deepep"):
        placement = RankRole(tokens_per_rank=tokens, ep_degree=1, dispatcher=name)
        assert saved == bytes_of_combine(layer, placement, tokens * k)


def test_combine_of_deepep_keeps_what_the_formula_says():
    """The results are in BF16 on the rank that computed them.

    The reference is autograd's record of torchtitan's operations before its kernel
    (distributed/deepep/deepep.py, which cannot be imported without DeepEP).
    """
    tokens, rows, dim = 48, 96, 32
    of_token = torch.arange(rows) % tokens
    results = torch.randn(rows, dim, dtype=torch.bfloat16, requires_grad=True)
    scores = torch.rand(rows, requires_grad=True)

    def combine() -> None:
        weighted = results * scores.to(results.dtype).reshape(-1, 1)
        index = of_token.reshape(-1, 1).expand(-1, dim)
        torch.zeros(tokens, dim, dtype=results.dtype).scatter_add(0, index, weighted)

    layer = MoELayer(num_experts=8, top_k=3, dim=dim, hidden_dim=1)
    placement = RankRole(tokens_per_rank=tokens, ep_degree=2, dispatcher="deepep")
    assert _saved_bytes(combine, (rows, dim)) == bytes_of_combine(layer, placement, rows)


def _saved_bytes(run: Callable[[], object], shape: tuple[int, ...] | None = None) -> int:
    """Bytes of the floating-point tensors that autograd keeps, of one shape or of any."""
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and shape in (None, tuple(tensor.shape)):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(saved.values())


def test_exchanges_bring_what_the_formula_says():
    """Each of 4 ranks sends 100 tokens to 4 of 16 experts: 400 there and 400 back, D 8 in BF16."""
    layer = MoELayer(num_experts=16, top_k=4, dim=8, hidden_dim=1)
    for dispatcher, degree, rows in (
        ("standard", 4, 400 + 400),
        # Of 4 ranks 4 choices hit 4 (1 - (3/4)^4) = 2.734 in the mean; one sum a token goes back.
        ("deepep", 4, 273.4375 + 100),
        ("standard", 1, 0),
        ("deepep", 1, 0),
    ):
        placement = RankRole(tokens_per_rank=100, ep_degree=degree, dispatcher=dispatcher)
        assert bytes_of_exchanges(layer, placement, 400) == pytest.approx(rows * 8 * 2)
    # All 1,600 choices of the group in one rank: no rank gets a token twice.
    crowded = RankRole(tokens_per_rank=100, ep_degree=4, dispatcher="deepep")
    assert bytes_of_exchanges(layer, crowded, 1600) == (400 + 100) * 8 * 2


def test_deepep_sends_no_token_twice_to_the_busiest_rank():
    """Each of 8 ranks on a node sends 100 tokens to one rank, which gets those of the other 7."""
    ranks = 8
    layer = MoELayer(num_experts=64, top_k=8, dim=64, hidden_dim=1)
    role = RankRole(tokens_per_rank=100, ep_degree=ranks, dispatcher="deepep")
    node = dataclasses.replace(DEVICE, scale_up_domain=ranks)
    found = exchange_time(layer, role, node, skew=float(ranks))
    assert found == pytest.approx(100 * (ranks - 1) * 64 * 2 / DEVICE.scale_up_bandwidth)


def test_pipeline_of_four_ranks():
    """1F1B with 4 stages and 8 micro-batches takes (8 + 3) x (F + B) without imbalance."""
    schedule = one_forward_one_backward(4, 8)
    assert makespan(schedule, [1.0] * 4, [2.0] * 4) == pytest.approx((8 + 3) * 3.0)
    # The third stage never waits once it has begun: two forwards come before its work and
    # two backwards after.
    slow = makespan(schedule, [1.0, 1.0, 3.0, 1.0], [2.0, 2.0, 6.0, 2.0])
    assert slow == pytest.approx(2 * 1.0 + 8 * 9.0 + 2 * 2.0)


def test_split_backward_fills_the_bubble():
    """With two stages, the backward of the weights can wait; that of the inputs cannot."""
    schedule = {
        0: [(0, "F", 0), (0, "F", 1), (0, "I", 0), (0, "I", 1), (0, "W", 0), (0, "W", 1)],
        1: [(1, "F", 0), (1, "I", 0), (1, "F", 1), (1, "I", 1), (1, "W", 0), (1, "W", 1)],
    }
    assert makespan(schedule, [1.0, 1.0], [2.0, 2.0]) == pytest.approx(8.0)


def test_largest_that_fits():
    assert largest_that_fits(lambda factor: factor <= 2.5, 8.0) == pytest.approx(2.5, abs=1e-3)
    assert largest_that_fits(lambda factor: True, 8.0) == 8.0
    assert largest_that_fits(lambda factor: False, 8.0) is None


@pytest.mark.parametrize("name", sorted(known_hardware()))
def test_every_figure_has_a_source(name):
    device = hardware(name)
    assert set(device.sources) == set(SPECS)
    assert all(len(source) > 10 for source in device.sources.values())


def test_hardware_of_the_users_own(tmp_path):
    path = tmp_path / "mine.toml"
    figures = {name: getattr(DEVICE, name) for name in SPECS}
    path.write_text("\n".join(f"{name} = {value!r}" for name, value in figures.items()))
    device = hardware(str(path))
    assert device.name == "mine"
    assert {name: getattr(device, name) for name in SPECS} == figures


def test_four_keys_of_a_device_may_be_left_out(tmp_path):
    """They are those of an H100, and their source says so."""
    path, h100 = tmp_path / "mine.toml", hardware("h100")
    left_out = {"scale_up_domain", "scale_up_latency", "scale_out_bandwidth", "scale_out_latency"}
    given = {name: 2 * getattr(h100, name) for name in SPECS if name not in left_out}
    path.write_text("\n".join(f"{name} = {value!r}" for name, value in given.items()))
    device = hardware(str(path))
    for name in left_out:
        assert getattr(device, name) == getattr(h100, name)
        assert device.sources[name].startswith("assumed")
    assert {name: getattr(device, name) for name in given} == given


def test_all_mistakes_of_a_device_at_once(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('name = "X100"\nbf16_flops = 1200\nmemory_bytes = 80\nmemory = 1')
    with pytest.raises(JobError) as error:
        hardware(str(path))
    for part in (
        "bf16_flops is 1200",
        "memory_bytes is 80",
        "'memory'",
        "'X100' lacks memory_band",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bf16_flops = 1e12", "'mine' lacks memory_bytes"),
        ("bf16_flop = 1e12", "'bf16_flop'; did you mean 'bf16_flops'?"),
    ],
)
def test_hardware_file_that_is_none(tmp_path, text, message):
    """These files are not in tests/refused."""
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(JobError) as error:
        hardware(str(path))
    assert message in str(error.value)


def test_this_host_is_a_device(tmp_path):
    """The measured file is read back; the host is slower than any accelerator, and is not taken for
    one."""
    path = tmp_path / "host.toml"
    path.write_text(as_toml(measure_host(size=64)))
    host = hardware(str(path))
    assert isinstance(host, Host) and isinstance(
        host.derated(compute_efficiency=0.5, network_efficiency=0.5), Host
    )
    path.write_text(path.read_text().replace('"host"', '"hots"'))
    with pytest.raises(JobError, match="kind is 'hots'; did you mean 'host'"):
        hardware(str(path))


IN_OTHER_UNITS = {
    "bf16_flops": (989, 989e3),  # TFLOP/s, GFLOP/s
    "memory_bytes": (80, 81_920),  # GB, MiB
    "memory_bandwidth": (3.35, 3350),  # TB/s, GB/s
    "scale_up_domain": (0.5, 450e9),
    "scale_up_bandwidth": (450, 450e3),  # GB/s, MB/s
    "scale_up_latency": (0.6, 600),  # us, ns
    "scale_out_bandwidth": (50, 400),  # GB/s, Gb/s
    "scale_out_latency": (2.7, 2700),  # us, ns
}


@pytest.mark.parametrize(
    ("figure", "value"), [(name, value) for name in SPECS for value in IN_OTHER_UNITS[name]]
)
def test_a_figure_in_another_unit_is_refused_by_name(figure, value, tmp_path):
    path = tmp_path / "mine.toml"
    figures = known_hardware()["h100"] | {figure: value}
    path.write_text("\n".join(f"{name} = {figures[name]!r}" for name in SPECS))
    with pytest.raises(JobError, match=f"{figure} is {value!r}; .*(/s|bytes|seconds|devices)"):
        hardware(str(path))


@pytest.mark.parametrize("line", ['sources = "a data sheet"', 'kind = ["host"]'])
def test_a_key_of_another_type_is_refused_by_name(line, tmp_path):
    path = tmp_path / "mine.toml"
    figures = known_hardware()["h100"]
    path.write_text("\n".join([*(f"{name} = {figures[name]!r}" for name in SPECS), line]))
    with pytest.raises(JobError, match=f"mine.toml: {line.split()[0]} is "):
        hardware(str(path))


@pytest.mark.parametrize("value", [0, -1.0, float("inf"), True, "fast"])
def test_figure_that_is_none(value):
    figures = {name: getattr(DEVICE, name) for name in SPECS}
    with pytest.raises(JobError, match="bf16_flops is .* must be a number above 0"):
        Hardware(name="mine", **{**figures, "bf16_flops": value})


def test_no_torch_to_compute():
    """The formulas need only numpy."""
    import subprocess
    import sys

    code = (
        "import sys, titan_moe_lb.costmodel, titan_moe_lb.costmodel.times.predict, "
        "titan_moe_lb.costmodel.hardware.device; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
