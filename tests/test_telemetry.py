"""The recorder and the reduction: once each, in order, without waiting, on every layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from tests.telemetry_jobs import (
    RefuseHostReads,
    collectives_of_a_logged_step,
    events,
    simulated_peaks,
    small_router,
)
from titan_moe_lb.expert_bias.sign import bias_update
from titan_moe_lb.forced_routing import BiasedNormal, HotRank, RandomBalanced, RoundRobin
from titan_moe_lb.recording import event_clock
from titan_moe_lb.telemetry import overload
from titan_moe_lb.telemetry.step_metrics import step_metrics
from titan_moe_lb.traces.step_load import StepLoad

TINY = ["--module", "deepseek_v3", "--config", "deepseek_v3_tiny", "--training.local_batch_size=4"]


def batch(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 8, 16, generator=generator, requires_grad=True)


@pytest.mark.parametrize("schedule", ["1F1B", "Interleaved1F1B", "ZBVZeroBubble"])
@pytest.mark.parametrize("checkpointing", ["None", "full"])
def test_cumulative_overload_is_that_of_the_schedule(ranks, schedule, checkpointing):
    """Against torch's own list of actions, with a load that differs in every micro-batch."""
    flags = [
        *TINY,
        "--parallelism.pipeline_parallel_degree=2",
        "--parallelism.expert_parallel_degree=2",
        f"--parallelism.pipeline_parallel_schedule={schedule}",
        "--model.forced_routing={type = 'biased_normal', std = 2.0}",
        f"activation-checkpoint:{checkpointing}",
    ]
    by_rank = ranks.run(4, simulated_peaks, flags)
    # Every forward and every backward of each stage.
    stages = 2 if schedule == "1F1B" else 4
    assert all(rank["num_actions"] == 2 * 4 * stages // 2 for rank in by_rank)
    logged = {rank["logged"] for rank in by_rank}
    assert len(logged) == 1
    expected = max(rank["simulated"] for rank in by_rank)
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


def test_stage_without_moe_layers_neither_hangs_nor_dilutes(ranks):
    by_rank = ranks.run(4, collectives_of_a_logged_step, [[], [4, 7]], 2)
    assert all(rank["layers"] == (4, 7) for rank in by_rank)
    assert all(rank["losses"] == by_rank[2]["losses"] for rank in by_rank)
    assert 0.9 < by_rank[0]["losses"]["seq_load_balancing_loss"][0] / 2 < 2


STRATEGIES = {
    "none": None,
    "round_robin": RoundRobin.Config(num_experts=8, top_k=2),
    "random_balanced": RandomBalanced.Config(num_experts=8, top_k=2),
    "biased_normal": BiasedNormal.Config(std=1.0, num_experts=8, top_k=2),
    "hot_rank": HotRank.Config(rank=0, fraction=0.5, num_experts=8, top_k=2, expert_parallel=2),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_host_synchronisation(strategy):
    router = small_router(num_micro_batches=4, forced_routing=STRATEGIES[strategy])
    event_clock.wire([router.clock])
    x_BLD = batch(1)
    with RefuseHostReads():
        router(x_BLD, torch.zeros(8))[0].sum().backward()
    assert router.recorder.counts_MSE[0, 0].sum() == 2 * 8 * 2


def test_the_refusal_refuses():
    with pytest.raises(AssertionError, match="host wait"), RefuseHostReads():
        torch.ones(3).sum().item()


def step(router: torch.nn.Module, *inputs: torch.Tensor) -> None:
    """All forwards, then all backwards: GPipe."""
    for output in [router(x)[0].sum() for x in inputs]:
        output.backward()


def in_order(counts_ME: np.ndarray) -> dict[str, np.ndarray]:
    """Three micro-batches as :func:`step` runs them."""
    return {
        "forward_times_M": np.array([1, 2, 3]),
        "backward_times_M": np.array([4, 5, 6]),
        "counts_ME": counts_ME,
    }


def selected(router: torch.nn.Module, *inputs: torch.Tensor) -> np.ndarray:
    """Counts of each batch from the router's answer, not from its recorder."""
    with torch.no_grad():
        ids = [router.eval()(x)[1] for x in inputs]
    router.train()
    return np.stack([torch.bincount(i.flatten(), minlength=8).numpy() for i in ids])


@pytest.mark.parametrize("how", ["eager", "checkpoint", "compiled", "compiled checkpoint"])
def test_every_micro_batch_is_recorded_in_its_place(how):
    router = small_router(num_micro_batches=3)
    event_clock.wire([router.clock])
    inputs = [batch(seed) for seed in range(3)]
    expected = in_order(selected(router, *inputs))

    def once(x_BLD):
        return router(x_BLD)

    def checkpointed(x_BLD):
        return checkpoint(router, x_BLD, use_reentrant=False)

    forward = checkpointed if "checkpoint" in how else once
    if "compiled" in how:
        forward = torch.compile(forward, fullgraph=True, backend="aot_eager")
    step(forward, *inputs)
    for name, values in events(3, router).items():
        assert (values == expected[name]).all(), name
    torch._dynamo.reset()


def test_a_backward_in_two_passes_counts_at_the_first():
    """A zero-bubble schedule runs the backward of a compiled block twice."""
    router = small_router(num_micro_batches=3)
    event_clock.wire([router.clock])
    outputs = [router(batch(seed))[0].sum() for seed in range(3)]
    for output in (*outputs, *reversed(outputs)):
        output.backward(retain_graph=True)
    assert router.clock.backward_times_M.tolist() == [4, 5, 6]


def test_a_replayed_step_records_without_its_python():
    """What a CUDA graph does: the operators of a captured step run again, on other data."""
    router = small_router(num_micro_batches=3)
    event_clock.wire([router.clock])
    inputs = [batch(seed) for seed in range(4)]
    expected = selected(router, *inputs)

    def forward_and_backward(x_BLD):
        return torch.autograd.grad(router(x_BLD)[0].sum(), x_BLD)[0]

    captured = make_fx(forward_and_backward)(inputs[0])
    event_clock.finish_step([router.clock])
    router.recorder.counts_MSE.zero_()
    router.clock.time.zero_()
    original, router.forward = router.forward, None  # no Python of the router from here on
    for x_BLD in inputs[1:]:
        captured(x_BLD)
    router.forward = original
    found = events(3, router)
    assert (found["counts_ME"] == expected[1:]).all()
    assert found["forward_times_M"].tolist() == [1, 3, 5]
    assert found["backward_times_M"].tolist() == [2, 4, 6]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph")
def test_a_cuda_graph_records_in_every_replay():
    with torch.device("cuda"):
        router = small_router(num_micro_batches=3).cuda()
        event_clock.wire([router.clock])
        inputs = [batch(seed).detach().cuda() for seed in range(4)]
        expected = selected(router, *inputs)
        static = inputs[0].clone().requires_grad_()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.autograd.grad(router(static)[0].sum(), static)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            torch.autograd.grad(router(static)[0].sum(), static)
        event_clock.finish_step([router.clock])
        router.recorder.counts_MSE.zero_()
        for x_BLD in inputs[1:]:
            with torch.no_grad():
                static.copy_(x_BLD)
            graph.replay()
        torch.cuda.synchronize()
        counts = router.recorder.counts_MSE[:, 0].cpu().numpy()
    assert (counts == expected[1:]).all()


def test_not_tracking_records_nothing():
    router = small_router(track=False)
    assert router.clock is None and not router.records
    router(batch(0))[0].sum().backward()
    assert router.recorder.counts_MSE.sum() == 0


def test_overload_factors():
    counts = np.array([[4, 4, 4, 4], [10, 2, 3, 1], [0, 0, 0, 0]])
    assert overload.tokens_per_rank(counts, 2).tolist() == [[8, 8], [12, 4], [0, 0]]
    per_rank = overload.tokens_per_rank(counts, 2)
    factors = overload.overload_factors(per_rank, per_rank.mean(axis=-1))
    assert factors.tolist() == [1.0, 1.5, 1.0]


def test_peak_tokens_by_hand():
    """Two routers, two micro-batches: F0 F0 F1 F1 B1 B1 B0 B0, with 1, 10, 100, 1000 tokens."""
    forward = np.array([[1, 3], [2, 4]])
    backward = np.array([[8, 6], [7, 5]])
    tokens = np.array([[1, 100], [10, 1000]])
    assert overload.peak_tokens(forward, backward, tokens) == 1111
    one_at_a_time = np.array([[1, 5], [2, 6]]), np.array([[4, 8], [3, 7]])
    assert overload.peak_tokens(*one_at_a_time, tokens) == 1100
    assert overload.cumulative_overload_factor(
        *one_at_a_time, tokens, np.full((2, 2), 550.0)
    ) == pytest.approx(1.0)
    zeros = np.zeros((2, 2))
    assert overload.cumulative_overload_factor(zeros, zeros, tokens, tokens) == 1


def test_step_metrics_by_hand():
    load = StepLoad(
        layers=(1, 3),
        counts_ME=np.array([[4, 4, 4, 4], [8, 4, 4, 0]]),
        losses={"z_loss": np.array([np.nan, 2.0])},
        avg_overload_factor_M=np.array([1.0, 1.5]),
        max_overload_factor_M=np.array([1.25, 2.0]),
        micro_batch_max_violation_M=np.array([0.5, 1.5]),
        max_cum_overload_factor=1.75,
    )
    metrics = step_metrics(load, per_layer=True)
    assert metrics["moe/max_violation"] == 0.5
    assert metrics["moe/max_violation_p50"] == 0.5
    assert metrics["moe/max_violation_p95"] == pytest.approx(0.95)
    assert metrics["moe/max_violation_max"] == 1.0
    assert metrics["moe/max_violation_micro_batch"] == 1.0
    assert metrics["moe/dead_experts"] == 0.5
    assert metrics["moe/avg_overload_factor"] == 1.25
    assert metrics["moe/max_overload_factor"] == 2.0
    assert metrics["moe/max_cum_overload_factor"] == 1.75
    assert metrics["moe/z_loss"] == 2.0
    assert metrics["moe/max_violation_layer_3"] == 1.0
    assert "moe/z_loss_layer_1" not in metrics
    assert step_metrics(load).keys() < metrics.keys()


def test_bias_update_by_hand():
    """Signs 0, -1, +1, +1 of the deviation, their mean taken off."""
    delta = bias_update(torch.tensor([4, 10, 1, 1]), 0.1)
    assert delta.tolist() == pytest.approx([-0.025, -0.125, 0.075, 0.075])
