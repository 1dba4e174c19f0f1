"""Tests of the metrics of scores: against plain numpy on recorded tokens, and a real bfloat16 gate."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.parity.gradients import save_seed
from tests.parity.layout import parse
from tests.support import score_jobs, score_metrics
from tests.support.freeze_jobs import train_with_trace
from tests.support.hash_layers import spec_with_hash_layer
from tests.support.own_loop_jobs import forward, initialised
from tests.support.routers import (
    EXPERTS,
    GROUPS,
    LENGTH,
    PADDED,
    ROWS,
    TOP_K,
    inputs,
    router,
    sequence_wise,
    with_mask,
)
from tests.support.score_metrics import Recorded, expected, joined
from tests.support.telemetry_jobs import DeviceOperators, forward_and_backward, moe_layers
from titan_moe_lb.balancing.expert_bias import QuantileBias
from titan_moe_lb.balancing.forced_routing import RoundRobin
from titan_moe_lb.balancing.recording.replayed import RouterReplay
from titan_moe_lb.balancing.recording.training_loop import TrainingLoop
from titan_moe_lb.balancing.router import LoadBalancedRouter, routers_of
from titan_moe_lb.balancing.step_hook import StepHook, wire
from titan_moe_lb.own_loop.attach import attach
from titan_moe_lb.parallel.rank_groups import RankGroups
from titan_moe_lb.telemetry import rank_step
from titan_moe_lb.telemetry.metrics import Metric
from titan_moe_lb.telemetry.metrics.scores import OfScores
from titan_moe_lb.traces.trace import read_trace

SCORES = TrainingLoop(scores_every=1)
OF_SCORES = [name for name, kind in Metric.kinds.items() if issubclass(kind, OfScores)]


def measured(built: LoadBalancedRouter, bias_E: torch.Tensor | None = None) -> dict[str, float]:
    """Close the step of a router and compute its metrics of scores."""
    record = built.step_record
    record.finish_step(ROWS)
    record.reduce([])
    step = rank_step.read([built], record, RankGroups(), [bias_E])
    return {name: float(Metric.kinds[name]().measure(step)[0]) for name in OF_SCORES}


def check(found: dict[str, float], seen: Recorded, score_func: str, **options: Any) -> None:
    """Compare with plain numpy, within 1e-6."""
    for name, value in expected(seen, score_func, **options).items():
        assert found[name] == pytest.approx(value, rel=1e-6, abs=1e-6, nan_ok=True), name


CASES = {
    "plain": {},
    "bias": {"bias": True},
    "groups": {"options": GROUPS, "bias": True},
    "padded": {"padded": True, "bias": True},
    "no loss": {"losses": []},
    "quantile": {"bias": True, "rule": QuantileBias.Config(num_bins=20)},
    "bfloat16": {"dtype": torch.bfloat16},
    "all experts": {"options": {"top_k": EXPERTS}},
    "all open experts": {"options": {"num_expert_groups": 4, "num_limited_groups": 1}},
}


@pytest.mark.parametrize("score_func", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("case", CASES)
def test_metrics_are_those_of_plain_numpy(case, score_func):
    """Two forwards of a step, one of which is recomputed, and an evaluation."""
    setting = CASES[case]
    options = setting.get("options", {})
    padded, dtype = setting.get("padded", False), setting.get("dtype", torch.float32)
    built = router(
        setting.get("losses", [sequence_wise()]),
        score_func,
        expert_bias=setting.get("rule"),
        loop=TrainingLoop(scores_every=1, padded=padded),
        dtype=dtype,
        **options,
    )
    if padded:
        with_mask(built, PADDED)
    seen = score_jobs.watch(built)
    x, bias = inputs(dtype)
    bias = bias if setting.get("bias") else None
    for scale, recomputed in ((0.1, False), (0.3, True)):
        call = functools.partial(checkpoint, built, use_reentrant=False) if recomputed else built
        call(x * scale, bias)[0].sum().backward()
    with torch.no_grad():
        built.eval()(x * 100, bias)
    groups = (4, options["num_limited_groups"]) if "num_expert_groups" in options else None
    has_margin = case not in ("all experts", "all open experts")
    assert len(seen) == 2
    found = measured(built, bias)
    check(found, joined(seen), score_func, groups=groups, has_margin=has_margin)
    assert 0 <= found["bfloat16_flip_share"] <= 1 if has_margin else True
    if case == "all experts":
        assert found["chosen_mass"] == pytest.approx(1) and np.isnan(found["gate_load_correlation"])


@pytest.mark.parametrize("compiled", [False, True])
def test_recording_changes_no_gradient(compiled):
    """Neither the scores that are dispatched nor a gradient; compiled without a graph break."""
    results = []
    for loop in (TrainingLoop(), SCORES):
        built = router([sequence_wise()], loop=loop, route_norm=True, **GROUPS)
        run = torch.compile(built, fullgraph=True, backend="aot_eager") if compiled else built
        x, bias = inputs()
        scores, ids, full = run(x, bias)
        (scores.square().sum() + full.sum()).backward()
        dispatched = torch.zeros_like(full).scatter(-1, ids, scores)
        results.append((dispatched, x.grad, built.gate.weight.grad, built.record.counts_MSE))
    for plain, recorded in zip(*results, strict=True):
        torch.testing.assert_close(recorded, plain, rtol=1e-6, atol=1e-7)
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_router_records_what_an_eager_one_does(backend):
    tables = []
    for compiled in (False, True):
        built = router([sequence_wise()], loop=TrainingLoop(scores_every=1, padded=True), **GROUPS)
        with_mask(built, PADDED)
        run = torch.compile(built, fullgraph=True, backend=backend) if compiled else built
        x, bias = inputs()
        run(x, bias)[0].sum().backward()
        tables.append((built.record.scores.sums_WC, built.record.scores.largest_logit))
    torch._dynamo.reset()
    for eager, found in zip(*tables, strict=True):
        torch.testing.assert_close(found, eager, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("score_func", "options", "more"),
    [("softmax", {}, 16), ("sigmoid", {}, 18), ("sqrtsoftplus", {}, 20), ("sigmoid", GROUPS, 28)],
)
def test_operators_of_a_forward(score_func, options, more):
    """The router has a loss and no bias; nothing is added to the backward."""
    counts = []
    for loop in (TrainingLoop(), SCORES):
        built = router([sequence_wise()], score_func, loop=loop, **options)
        x, _ = inputs()
        built(x)[0].sum().backward()
        with DeviceOperators() as in_forward:
            scores = built(x)[0]
        with DeviceOperators() as in_backward:
            scores.sum().backward()
        counts.append((in_forward.count, in_backward.count))
    (forward, backward), recorded = counts
    assert recorded == (forward + more, backward)


def test_a_step_that_is_left_out_has_the_operators_of_a_router_without():
    counts = []
    for every in (0, 2):
        built = router([sequence_wise()], loop=TrainingLoop(scores_every=every))
        built.step_record.records_scores = False
        with DeviceOperators() as operators:
            built(inputs()[0])[0].sum().backward()
        counts.append(operators.count)
    assert counts[0] == counts[1]
    assert all(np.isnan(value) for value in measured(built).values())


def test_both_kinds_of_steps_compile_once():
    built = router([sequence_wise()], loop=TrainingLoop(scores_every=2))
    graphs = []
    compiled = torch.compile(
        built, backend=lambda graph, _inputs: graphs.append(graph) or graph.forward, fullgraph=True
    )
    for records in (True, False, True, False):
        built.step_record.records_scores = records
        compiled(*inputs())
    assert len(graphs) == 2


def test_logged_steps_are_those_of_a_run_that_logs_every_step(ranks, tmp_path):
    """Logged are the steps 1, 2, 4 and 6."""
    traces = []
    for every in (1, 2):
        flags = [f"--metrics.log_freq={every}", f"--dump_folder={tmp_path}/{every}"]
        ranks.run(1, train_with_trace, [*JOB, *flags])
        traces.append(read_trace(tmp_path / str(every)))
    whole, logged = traces
    assert logged.steps.tolist() == [1, 2, 4, 6]
    for name in OF_SCORES:
        expected = whole.layer_columns[name][np.isin(whole.steps, logged.steps)]
        assert not np.isnan(expected).any(), name
        np.testing.assert_array_equal(logged.layer_columns[name], expected, name)


@pytest.mark.parametrize("num_layers", [2, 9])
def test_operators_of_a_step_end(num_layers):
    counts = []
    for scores in (False, True):
        layers = moe_layers(list(range(num_layers)))
        for layer in layers:
            layer.router.config.loop = TrainingLoop(scores_every=int(scores))
        hook = StepHook(layers, wire([one.router for one in layers], RankGroups()), RankGroups())
        forward_and_backward(layers)
        with DeviceOperators() as operators:
            hook.close_step()
        counts.append(operators.count)
    assert counts[1] == counts[0] + 6


def test_a_forced_choice_has_no_margin():
    built = router([sequence_wise()], loop=SCORES)
    strategy = RoundRobin.Config(num_experts=EXPERTS, top_k=TOP_K).build()
    built.forced_routing = strategy
    seen = score_jobs.watch(built)
    built(inputs()[0])[0].sum().backward()
    check(measured(built), joined(seen), "sigmoid", has_margin=False)


def test_a_replay_measures_the_routers_own_choice():
    plain, replayed = (router([sequence_wise()], loop=SCORES) for _ in range(2))
    replay = replayed.replay = RouterReplay()
    replay.expert_ids_BLK = torch.arange(TOP_K).expand(ROWS, LENGTH, TOP_K)
    replay.changed_2 = torch.zeros(2, dtype=torch.int64)
    found = []
    for built in (plain, replayed):
        x, bias = inputs()
        built(x, bias)[0].sum().backward()
        found.append(measured(built, bias))
    assert replay.changed_2[0] > 0
    del found[0]["gate_load_correlation"], found[1]["gate_load_correlation"]  # of the tokens
    assert found[0] == found[1]


def test_a_step_of_padding_alone_has_no_value():
    built = router([sequence_wise()], loop=TrainingLoop(scores_every=1, padded=True))
    with_mask(built, torch.zeros_like(PADDED))
    built(inputs()[0])[0].sum().backward()
    assert all(np.isnan(value) for value in measured(built).values())


def test_a_hash_layer_has_no_value():
    model = initialised(spec_with_hash_layer())
    balance = attach(model, rows_per_step=2, router_scores=True)
    tokens = torch.randint(0, 2048, (2, 32), generator=torch.Generator().manual_seed(0))
    routers_of([model])[0].input_ids = tokens
    forward(model, tokens).float().square().mean().backward()
    balance.close_step()
    load, metrics = balance.load(), balance.metrics()
    for name in OF_SCORES:
        assert np.isnan(load.layer_columns[name]).tolist() == [True, False, False], name
        assert np.isfinite(metrics[f"moe/{name}"])


def test_without_the_switch_there_is_nothing():
    model = initialised(spec_with_hash_layer())
    balance = attach(model, rows_per_step=2)
    tokens = torch.randint(0, 2048, (2, 32), generator=torch.Generator().manual_seed(0))
    routers_of([model])[0].input_ids = tokens
    forward(model, tokens).float().square().mean().backward()
    balance.close_step()
    assert not set(OF_SCORES) & set(balance.load().layer_columns)
    assert all(one.record.scores is None for one in routers_of([model]))


JOB = [
    "--config=deepseek_v3_tiny",
    "--training.seq_len=64",
    "--training.local_batch_size=2",
    "--training.steps=6",
    "--debug.seed=0",
    "--metrics.router_scores",
]
FLIPS = {
    "8 experts": ("softmax", 8, 2, {}),
    "64 experts": ("softmax", 64, 8, {}),
    "128 experts, uneven tokens": ("softmax", 128, 8, {"spread": 0.5}),
    "large logits": ("softmax", 64, 8, {"scale": 3.0, "spread": 0.5}),
    "biased softmax": ("softmax", 64, 8, {"bias": 0.02}),
    "sigmoid": ("sigmoid", 256, 8, {"spread": 0.3}),
    "biased sigmoid": ("sigmoid", 256, 8, {"spread": 0.3, "bias": 0.05}),
    "many chosen": ("sigmoid", 64, 16, {"scale": 0.3, "bias": 0.02}),
    "sqrtsoftplus": ("sqrtsoftplus", 256, 6, {"bias": 0.05}),
    "4 of 8 groups": ("sigmoid", 256, 8, {"groups": (8, 4), "spread": 0.3}),
    "4 of 8 groups, biased": ("sigmoid", 256, 8, {"groups": (8, 4), "bias": 0.05}),
    "4 of 8 groups, small logits": (
        "sigmoid",
        256,
        8,
        {"groups": (8, 4), "scale": 0.3, "bias": 0.02, "spread": 0.3},
    ),
    "4 of 8 groups, large logits": (
        "sigmoid",
        256,
        8,
        {"groups": (8, 4), "scale": 3.0, "spread": 0.5},
    ),
    "3 of 8 groups": ("softmax", 160, 6, {"groups": (8, 3), "spread": 0.3}),
    "3 of 8 groups, large logits": (
        "softmax",
        160,
        6,
        {"groups": (8, 3), "scale": 3.0, "spread": 0.5},
    ),
    "4 of 16 groups": ("sqrtsoftplus", 256, 8, {"groups": (16, 4), "bias": 0.05}),
    "2 of 8 groups": ("sigmoid", 128, 8, {"groups": (8, 2), "spread": 0.3}),
    "2 of 4 groups": ("softmax", 64, 8, {"groups": (4, 2), "spread": 0.3}),
    "8 of 16 groups": ("softmax", 256, 8, {"groups": (16, 8), "spread": 0.3, "bias": 0.001}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", FLIPS)
def test_the_flip_share_is_that_of_a_real_bfloat16_gate(case, dtype):
    """10,000 tokens; the gate multiplies in bfloat16, and scores and bias are in float32."""
    score_func, num_experts, top_k, setting = FLIPS[case]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 10_000, 512, generator=generator)
    x *= torch.exp(setting.get("spread", 0.0) * torch.randn(1, 10_000, 1, generator=generator))
    weight = (
        torch.randn(num_experts, 512, generator=generator) * setting.get("scale", 1.0) / 512**0.5
    )
    bias = None
    if "bias" in setting:
        bias = setting["bias"] * torch.randn(num_experts, generator=generator)
    groups = setting.get("groups")
    built = score_jobs.wide_router(score_func, num_experts, top_k, weight.to(dtype), groups)
    x = x.to(dtype)
    ids = built(x, bias)[1][0]
    logits = torch.nn.functional.linear(x[0].bfloat16(), weight.to(dtype).bfloat16()).float()
    scores = score_metrics.scores_and_slopes(logits.double().numpy(), score_func)[0]
    biases = None if bias is None else bias.numpy()
    selection = score_metrics.selection_scores(scores.astype(np.float32), biases, groups)
    selection = torch.from_numpy(selection)
    rounded = selection.topk(top_k, dim=-1).indices
    real = float((ids.sort().values != rounded.sort().values).any(dim=-1).double().mean())
    found = measured(built, bias)["bfloat16_flip_share"]
    print(f"{case}, {dtype}: {real:.2%} differ, {found:.2%} estimated")
    assert real > 0 and found == pytest.approx(real, abs=0.01)


MODEL = {"aux_losses": [{"type": "sequence_wise", "weight": 1e-2}]}
LAYOUTS = [
    "",
    "dp_shard=2",
    "pp=2,schedule=ZBVZeroBubble",
    "tp=2",
    "tp=2,ep=2",
    "cp=2",
    "accumulate=4",
    "ac=full",
    "ac=selective",
    "compile=true",
    "compile=true,ac=full,backend=aot_eager",
]


@pytest.fixture(scope="module")
def seed(ranks, tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("scores") / "seed")
    ranks.run(1, save_seed, folder, "deepseek_v3", "deepseek_v3_tiny", MODEL)
    return folder


@pytest.fixture(scope="module")
def in_one_process(ranks, seed, tmp_path_factory) -> dict[int, Recorded]:
    """Tokens of every layer in one process, which are those of a compiled model."""
    return _run(ranks, seed, tmp_path_factory, "", "none")[1]


def _run(ranks, seed, tmp_path_factory, text, padding):
    layout = parse(text)
    out = str(tmp_path_factory.mktemp("scores"))
    job = {"module": "deepseek_v3", "config": "deepseek_v3_tiny", "model": MODEL}
    by_rank = ranks.run(
        layout.num_ranks, score_jobs.scores_of_layout, seed, out, layout, padding=padding, **job
    )
    metrics = by_rank[0][0]
    assert all(found == metrics for found, _ in by_rank[1:])
    seen = {
        layer: joined([parts[layer] for _, parts in by_rank if layer in parts])
        for layer in metrics
        if any(layer in parts for _, parts in by_rank)
    }
    return metrics, seen


@pytest.mark.parametrize(
    ("text", "padding"),
    [(text, "none") for text in LAYOUTS]
    + [(text, "masked") for text in ("dp_shard=2", "pp=2,schedule=ZBVZeroBubble", "cp=2")],
)
def test_metrics_do_not_depend_on_the_layout(
    ranks, seed, in_one_process, tmp_path_factory, text, padding
):
    """Every metric equals plain numpy on the tokens that the ranks' routers saw."""
    metrics, seen = _run(ranks, seed, tmp_path_factory, text, padding)
    assert len(metrics) >= 2
    for layer, found in metrics.items():
        tokens = in_one_process[layer] if parse(text).compile else seen[layer]
        check(found, tokens, "sigmoid", groups=(4, 2))
        assert 0 < found["bfloat16_flip_share"] < 1
