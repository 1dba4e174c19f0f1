"""Tests of record and reduction: each step once, in order, without waiting, on every layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from tests.support.host_reads import RefuseHostReads
from tests.support.telemetry_jobs import (
    DeviceOperators,
    batch,
    collectives_of_a_logged_step,
    counts_of_a_replayed_graph,
    forward_and_backward,
    moe_layers,
    observed_peaks,
    selected,
    small_router,
)
from titan_moe_lb.balancing.forced_routing import (
    BiasedNormal,
    Burst,
    HotExperts,
    HotRank,
    Ragged,
    RandomBalanced,
    Rotating,
    RoundRobin,
    ZeroLoad,
)
from titan_moe_lb.balancing.losses import GlobalBatchAuxLoss, RouterZLoss, SequenceWiseAuxLoss
from titan_moe_lb.balancing.step_hook import StepHook, wire
from titan_moe_lb.parallel.rank_groups import RankGroups
from titan_moe_lb.parallel.schedules import one_forward_one_backward
from titan_moe_lb.telemetry.metrics import overload

TINY = ["--module", "deepseek_v3", "--config", "deepseek_v3_tiny", "--training.local_batch_size=4"]


@pytest.mark.parametrize("schedule", ["1F1B", "Interleaved1F1B", "ZBVZeroBubble"])
@pytest.mark.parametrize("checkpointing", ["None", "full"])
def test_cumulative_overload_is_that_of_the_running_stages(ranks, schedule, checkpointing):
    """The reference is the calls of torch's stages, with a load that differs in every
    micro-batch."""
    flags = [
        *TINY,
        "--parallelism.pipeline_parallel_degree=2",
        "--parallelism.expert_parallel_degree=2",
        f"--parallelism.pipeline_parallel_schedule={schedule}",
        "--model.forced_routing={type = 'biased_normal', std = 2.0}",
        f"activation-checkpoint:{checkpointing}",
    ]
    by_rank = ranks.run(4, observed_peaks, flags)
    # Every micro-batch is kept and freed once by each stage.
    stages = 2 if schedule == "1F1B" else 4
    assert all(rank["num_events"] == 2 * 4 * stages // 2 for rank in by_rank)
    logged = {rank["logged"] for rank in by_rank}
    assert len(logged) == 1
    expected = max(rank["observed"] for rank in by_rank)
    assert expected > 1.05
    assert logged.pop() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("ep", [1, 2])
def test_collectives_do_not_grow_with_the_layers(ranks, ep):
    """The bias update sums the counts once; the metrics take that sum and add their own."""
    few, many = (
        ranks.run(4, collectives_of_a_logged_step, [list(range(n)), list(range(n, 2 * n))], ep)
        for n in (2, 32)
    )
    for rank in (*few, *many):
        assert rank["of_bias_update"] == 1
        assert rank["of_metrics"] == 4 + (ep > 1)
        assert rank["tokens"] == [2 * 2 * 8 * 2] * len(rank["layers"])
    assert [len(found[0]["layers"]) for found in (few, many)] == [4, 64]
    # Two ranks route the tokens of each stage; the first EP group is the first of them, or both.
    stages = (few[:2], few[2:])
    first = [np.sum([rank["mine"] for rank in stage[:ep]], axis=0) for stage in stages]
    assert all(rank["micro_batch"] == np.concatenate(first).tolist() for rank in few)
    assert few[0]["mine"] != few[1]["mine"]


def test_stage_without_moe_layers_neither_hangs_nor_dilutes(ranks):
    by_rank = ranks.run(4, collectives_of_a_logged_step, [[], [4, 7]], 2)
    assert all(rank["layers"] == (4, 7) for rank in by_rank)
    for name in ("layer_columns", "step_columns"):
        assert all(rank[name] == by_rank[2][name] for rank in by_rank)
    assert 0.9 < by_rank[0]["layer_columns"]["seq_load_balancing_loss"][0] < 2


BOUND = {"num_experts": 8, "top_k": 2}
THREE_LOSSES = (
    SequenceWiseAuxLoss.Config(weight=1e-4, count_from="scores"),
    GlobalBatchAuxLoss.Config(weight=1e-3),
    RouterZLoss.Config(weight=1e-4),
)


@pytest.mark.parametrize("losses", [None, THREE_LOSSES], ids=["default", "three losses"])
@pytest.mark.parametrize("num_layers", [4, 61])
def test_operators_of_a_step_end_do_not_grow_with_the_layers(num_layers, losses):
    layers = moe_layers(list(range(num_layers)), losses and list(losses))
    hook = StepHook(layers, wire([layer.router for layer in layers], RankGroups()), RankGroups())
    forward_and_backward(layers)
    with DeviceOperators() as operators:
        hook.close_step()
    assert operators.count == (29 if losses else 21), operators.names
    assert layers[0].expert_bias_E.abs().max() > 0


@pytest.mark.parametrize(
    ("rule", "at_step_end", "in_router"),
    [
        ("sign", 21, 32),
        ("proportional", 18, 32),
        ("momentum", 28, 32),
        ("quantile", 46, 60),
        ("quantile_trend", 56, 60),
    ],
)
def test_operators_of_a_bias_rule(rule, at_step_end, in_router):
    """The router has no loss.

    In the router, the quantile rule needs its histogram and, here, the required bias under the
    group limit.
    """
    for num_layers in (1, 4):
        layers = moe_layers(list(range(num_layers)), [], expert_bias=rule)
        hook = StepHook(
            layers, wire([layer.router for layer in layers], RankGroups()), RankGroups()
        )
        forward_and_backward(layers)
        with DeviceOperators() as operators:
            hook.close_step()
        assert operators.count == at_step_end, operators.names
    x_BLD = torch.randn(2, 8, 64, requires_grad=True)
    assert operators_of_a_router(layers[0].router, x_BLD) == in_router


def operators_of_a_router(router: torch.nn.Module, x_BLD: torch.Tensor) -> int:
    """Count the operators of forward and backward, which add to existing gradients."""
    bias_E = torch.zeros(8)

    def forward() -> torch.Tensor:
        return router(x_BLD, bias_E)[0]

    forward().backward(torch.ones(2, 8, 2))
    with DeviceOperators() as operators:
        scores = forward()
        scores.backward(torch.ones_like(scores))
    return operators.count - 1  # the gradient of ones


@pytest.mark.parametrize("num_micro_batches", [1, 4])
def test_operators_of_a_router(num_micro_batches):
    """The router is DeepSeek-V3's: group-limited, with normalized sigmoid scores."""
    bare, default, three = (
        moe_layers([0], losses)[0].router for losses in ([], None, list(THREE_LOSSES))
    )
    for router in (bare, default, three):
        loop = replace(router.config.loop, num_micro_batches=num_micro_batches)
        router.config.loop = loop
    for router in (bare, default, three):
        assert router.num_expert_groups is not None and router.route_norm
    still = moe_layers([0], [], expert_bias="frozen")[0].router  # which trains without a loop
    unwired = operators_of_a_router(still, torch.randn(2, 8, 64, requires_grad=True))
    assert unwired == 30, "torchtitan's own"
    counts = []
    for router in (bare, default, three):
        wire([router], RankGroups())
        counts.append(operators_of_a_router(router, torch.randn(2, 8, 64, requires_grad=True)))
    assert counts == [32, 45, 57]


STRATEGIES = {
    "none": None,
    "round_robin": RoundRobin.Config(num_experts=8, top_k=2),
    "random_balanced": RandomBalanced.Config(num_experts=8, top_k=2),
    "biased_normal": BiasedNormal.Config(std=1.0, num_experts=8, top_k=2),
    "hot_rank": HotRank.Config(rank=0, fraction=0.5, num_experts=8, top_k=2, expert_parallel=2),
    "hot_experts": HotExperts.Config(num_hot=2, fraction=0.5, num_experts=8, top_k=2),
    "ragged": Ragged.Config(fraction=0.5, num_experts=8, top_k=2),
    "zero_load": ZeroLoad.Config(num_zero=2, num_experts=8, top_k=2),
    "rotating": Rotating.Config(num_hot=2, fraction=0.5, num_experts=8, top_k=2),
    "burst": Burst.Config(num_hot=2, fraction=0.5, num_experts=8, top_k=2),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_host_synchronisation(strategy):
    router = small_router(num_micro_batches=4, forced_routing=STRATEGIES[strategy])
    x_BLD = batch(1)
    with RefuseHostReads():
        router(x_BLD, torch.zeros(8))[0].sum().backward()
    assert router.record.counts_MSE[0, 0].sum() == 2 * 8 * 2


def forward_of_a_part(router: torch.nn.Module, forward: Callable, x_BLD: torch.Tensor):
    """Run a forward of the router as the only one of its model part."""
    output = forward(x_BLD)[0].sum()
    router.step_record.finish_forward(slice(None))
    return output


@pytest.mark.parametrize("how", ["eager", "checkpoint", "compiled", "compiled checkpoint"])
def test_every_micro_batch_is_recorded_in_its_place(how):
    router = small_router(num_micro_batches=3)
    inputs = [batch(seed) for seed in range(3)]
    expected = selected(router, *inputs)

    def once(x_BLD):
        return router(x_BLD)

    def checkpointed(x_BLD):
        return checkpoint(router, x_BLD, use_reentrant=False)

    forward = checkpointed if "checkpoint" in how else once
    if "compiled" in how:
        forward = torch.compile(forward, fullgraph=True, backend="aot_eager")
    # All forwards, then all backwards: GPipe.
    for output in [forward_of_a_part(router, forward, x) for x in inputs]:
        output.backward()
    assert (router.record.counts_MSE[:, 0].numpy() == expected).all()
    torch._dynamo.reset()


def test_a_replayed_step_records_without_its_python():
    """A CUDA graph runs the operators of a captured step again, on other data."""
    router = small_router(num_micro_batches=3)
    inputs = [batch(seed) for seed in range(4)]
    expected = selected(router, *inputs)

    def forward_and_backward(x_BLD):
        return torch.autograd.grad(forward_of_a_part(router, router, x_BLD), x_BLD)[0]

    captured = make_fx(forward_and_backward)(inputs[0])
    router.step_record.finish_step(2)
    original, router.forward = router.forward, None  # no Python of the router from here on
    for x_BLD in inputs[1:]:
        captured(x_BLD)
    router.forward = original
    assert (router.record.counts_MSE[:, 0].numpy() == expected[1:]).all()


def test_a_cuda_graph_records_in_every_replay(gpu_ranks):
    ((recorded, expected),) = gpu_ranks.run(1, counts_of_a_replayed_graph)
    assert (recorded == expected).all()


def test_without_anyone_who_asks_nothing_is_recorded():
    router = small_router(track=False, aux_losses=[])
    assert router.record is None
    router(batch(0))[0].sum().backward()


def test_overload_factors():
    counts = np.array([[4, 4, 4, 4], [10, 2, 3, 1], [0, 0, 0, 0]])
    factors = overload.overload_factors(counts.reshape(3, 2, 2).sum(axis=-1))
    assert factors.tolist() == [1.0, 1.5, 1.0]


def test_peak_tokens_by_hand():
    """The stage has two layers.

    They get 1 and 10 tokens in the first micro-batch, and 100 and 1000 in the second.
    """
    tokens = np.array([[1, 100], [10, 1000]])
    (one_stage,) = one_forward_one_backward(1, 2).values()  # F0 B0 F1 B1
    assert overload.peak_tokens(one_stage, [0, 0], tokens) == 1100
    first_of_two = one_forward_one_backward(2, 2)[0]  # F0 F1 B0 B1
    assert overload.peak_tokens(first_of_two, [0, 0], tokens) == 1111
    # Kept until the weights' backward: F0 I0 F1 W0, and the second is there before the
    # first has gone.
    split = [(0, "F", 0), (0, "I", 0), (0, "F", 1), (0, "W", 0), (0, "I", 1), (0, "W", 1)]
    assert overload.peak_tokens(split, [0, 0], tokens) == 1111
    # Two passes of one micro-batch each: accumulation keeps nothing between them.
    alone = one_forward_one_backward(1, 1)[0]
    assert overload.peak_tokens(alone, [0, 0], tokens) == 1100
    assert overload.cumulative_overload_factor(
        alone, [0, 0], tokens, np.full((2, 2), 550.0)
    ) == pytest.approx(1.0)
    assert overload.cumulative_overload_factor(alone, [0, 0], tokens * 0, tokens * 0.0) == 1
