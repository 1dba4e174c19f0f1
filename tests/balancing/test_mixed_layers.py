"""Tests of layers that differ in bias, speed, top_k or number of experts."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torchtitan.config import TrainingConfig
from torchtitan.models.common.moe import MoE
from torchtitan.models.deepseek_v3 import model_registry

from tests.support.mixed_jobs import NUM_EXPERTS, SPEEDS, TOP_K, mixed_spec, train_mixed
from tests.support.synthetic_trace import run_info
from tests.support.telemetry_jobs import DeviceOperators, forward_and_backward, moe_layers
from tests.support.textbook import sign_rule
from titan_moe_lb import attach, build_model
from titan_moe_lb.balancing.forced_routing import RandomBalanced, Replay
from titan_moe_lb.balancing.losses import SequenceWiseAuxLoss
from titan_moe_lb.balancing.router import moe_layers_of
from titan_moe_lb.balancing.step_hook import StepHook, wire
from titan_moe_lb.checkpoints import placement_file
from titan_moe_lb.commands.diagnose.checks import diagnosis
from titan_moe_lb.commands.plan.recorded_run import loads_of_run
from titan_moe_lb.commands.report import load_codes, summary
from titan_moe_lb.commands.report.page import render
from titan_moe_lb.commands.watch.follower import Follower
from titan_moe_lb.commands.watch.frame import frame
from titan_moe_lb.errors import JobError
from titan_moe_lb.parallel.layout import Layout
from titan_moe_lb.parallel.rank_groups import RankGroups
from titan_moe_lb.resolved_job import Job
from titan_moe_lb.rules.model import layers_count_their_experts_alike
from titan_moe_lb.rules.routers import routers_are_right
from titan_moe_lb.traces.balance_statistics import ABSENT
from titan_moe_lb.traces.routing_trace import RoutingTrace
from titan_moe_lb.traces.trace import Trace, read_trace
from titan_moe_lb.wiring.model_spec import balanced

RULES = ["sign", "proportional", "momentum", "quantile", "quantile_trend"]
TOKENS = torch.randint(0, 256, (2, 64), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "speeds", [[None, 1e-2, 1e-3, 1e-3, 1e-3], [1e-3, None, 2e-3, None, 5e-3]], ids=str
)
def test_each_layer_keeps_its_own_speed_in_a_loop(speeds):
    """The reference is the rule, applied to the experts that the routers return."""
    spec = model_registry("debugmodel")
    for (_fqn, moe, *_), speed in zip(spec.model.traverse(MoE.Config), speeds, strict=True):
        moe.load_balance_coeff = speed
    training = TrainingConfig(seq_len=64, mixed_precision_param="float32")
    model, dims, context = build_model(balanced(spec), training=training, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    balance = attach(model, optimizer, dims)
    layers = moe_layers_of([model])
    counts: list[list[np.ndarray]] = [[] for _layer in layers]
    for layer, rows in zip(layers, counts, strict=True):
        layer.router.register_forward_hook(
            lambda _router, _inputs, out, rows=rows: rows.append(
                torch.bincount(out[1].flatten(), minlength=8).numpy()
            )
        )
    places = torch.arange(64).expand_as(TOKENS)
    for _step in range(3):
        with context():
            masks = model.get_attention_masks(places)
            output = model(TOKENS, attention_masks=masks, positions=places)
            output.float().logsumexp(-1).mean().backward()
        optimizer.step()
    assert len(layers) == 5
    for layer, rows, speed in zip(layers, counts, speeds, strict=True):
        if speed is None:
            assert layer.expert_bias_E is None
        else:
            expected = sign_rule(np.array(rows), speed)
            assert layer.expert_bias_E.numpy() == pytest.approx(expected, abs=1e-8)
            assert np.abs(expected).max() >= speed
    names = {key for key in balance.metrics(per_layer=True) if "bias_range_layer_" in key}
    known = [layer.router.layer for layer in layers if layer.expert_bias_E is not None]
    assert names == {f"moe/bias_range_layer_{number}" for number in known}


def mixed_layers(rule: str, copies: int = 1) -> list[MoE]:
    """Build layers with 8 and 16 experts and top 2, 1 and 4; some have no bias or no rule."""
    kinds = [
        {},
        {"num_experts": 16},
        {"top_k": 1},
        {"bias": False},
        {"num_experts": 16, "top_k": 4},
    ]
    return moe_layers(list(range(len(kinds) * copies)), [], expert_bias=rule, kinds=kinds)


@pytest.mark.parametrize("rule", RULES)
def test_a_layer_among_others_is_what_it_is_alone(rule):
    together, alone = mixed_layers(rule), mixed_layers(rule)
    hooks = [
        StepHook(together, wire([layer.router for layer in together], RankGroups()), RankGroups())
    ]
    for layer in alone:
        record = wire([layer.router], RankGroups())
        assert record is not None
        hooks.append(StepHook([layer], record, RankGroups()))
    for _step in range(3):
        forward_and_backward(together)
        forward_and_backward(alone)
        for hook in hooks:
            hook.close_step()
    moved = 0
    for one, other in zip(together, alone, strict=True):
        if one.expert_bias_E is not None:
            assert torch.equal(one.expert_bias_E, other.expert_bias_E)
            moved += one.expert_bias_E.abs().max() > 0
    assert moved == 4


def test_operators_of_a_step_end_grow_with_the_kinds_alone():
    counts = []
    for copies in (1, 8):
        layers = mixed_layers("sign", copies)
        hook = StepHook(
            layers, wire([layer.router for layer in layers], RankGroups()), RankGroups()
        )
        forward_and_backward(layers)
        with DeviceOperators() as operators:
            hook.close_step()
        counts.append(operators.count)
    assert counts[0] == counts[1]


OTHER_LOSS = [SequenceWiseAuxLoss.Config(weight=5.0, num_experts=16, top_k=3)]


@pytest.mark.parametrize(
    ("key", "value"),
    [("aux_losses", OTHER_LOSS), ("aux_losses", []), ("forced_routing", None)],
    ids=["other weight", "no loss", "no forced routing"],
)
def test_losses_and_forced_routing_are_those_of_every_layer(key, value):
    """A step has one weight for a loss, also if layers have their own numbers."""
    spec = balanced(
        mixed_spec(),
        aux_losses=[SequenceWiseAuxLoss.Config(weight=1e-3)],
        forced_routing=RandomBalanced.Config(),
    )
    job = Job(spec.model, Layout(), start=None)
    routers_are_right(job)
    setattr(spec.model.layers[3].moe.router, key, value)
    with pytest.raises(JobError, match="layer 3 .*layer 1 "):
        routers_are_right(job)


LAYOUTS = {
    "one rank": (1, {}),
    "pipeline and experts": (
        4,
        {
            "parallelism.pipeline_parallel_degree": 2,
            "parallelism.expert_parallel_degree": 2,
        },
    ),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def run(request, ranks, tmp_path_factory):
    """Run a model whose layers differ; return its folder and its last biases."""
    num_ranks, layout = LAYOUTS[request.param]
    folder = tmp_path_factory.mktemp("mixed")
    settings = layout | {"metrics.record_routing_steps": [2]}
    return folder, merged(ranks.run(num_ranks, train_mixed, str(folder), settings))


def merged(found: list[dict[int, list[float]]]) -> dict[int, list[float]]:
    """Biases of all ranks, which must agree."""
    biases: dict[int, list[float]] = {}
    for rank in found:
        for number, bias_E in rank.items():
            assert biases.setdefault(number, bias_E) == bias_E
    return biases


def require_own_rules(trace: Trace, biases: dict[int, list[float]]) -> None:
    """Check the biases against torchtitan's rule on the trace, at each layer's speed."""
    assert biases.keys() == {number for number, speed in SPEEDS.items() if speed is not None}
    for row, number in enumerate(trace.layers):
        range_S = trace.layer_columns["bias_range"][:, row]
        if SPEEDS[number] is None:
            assert np.isnan(range_S).all()
        else:
            counts_SE = trace.counts_SME[:, row, : NUM_EXPERTS[number]]
            expected_E = sign_rule(counts_SE, SPEEDS[number])
            assert biases[number] == pytest.approx(expected_E, abs=1e-7)
            assert range_S[-1] == pytest.approx(np.ptp(expected_E), rel=1e-5)


def test_each_layer_keeps_its_own_under_the_trainer(run):
    folder, biases = run
    trace = read_trace(folder)
    info = trace.info
    assert trace.layers == tuple(SPEEDS)
    assert dict(zip(trace.layers, info.num_experts_M.tolist(), strict=True)) == NUM_EXPERTS
    assert dict(zip(trace.layers, info.top_k_M.tolist(), strict=True)) == TOP_K
    require_own_rules(trace, biases)
    tokens = info.global_batch_size * info.seq_len
    for row, number in enumerate(trace.layers):
        counts_SE = trace.counts_SME[:, row, : NUM_EXPERTS[number]]
        assert (trace.counts_SME[:, row, NUM_EXPERTS[number] :] == ABSENT).all()
        assert (counts_SE.sum(axis=1) == TOP_K[number] * tokens).all()
        violation_S = counts_SE.max(axis=1) / counts_SE.mean(axis=1) - 1
        single_S = trace.layer_columns["micro_batch_max_violation"][:, row]
        assert (single_S >= violation_S - 1e-9).all()


def test_what_reads_a_run_counts_the_experts_that_are_there(run):
    """The recorded routing agrees with the trace.

    Report, watch and diagnose name no expert that a layer does not have. A plan from the run is
    refused.
    """
    folder, _biases = run
    trace, routing = read_trace(folder), RoutingTrace(folder)
    for row, number in enumerate(trace.layers):
        ids_BLK = routing.expert_ids(2, number)
        assert ids_BLK.shape[-1] == TOP_K[number]
        counts_E = np.bincount(ids_BLK.ravel(), minlength=NUM_EXPERTS[number])
        assert counts_E.tolist() == trace.counts_SME[1, row, : NUM_EXPERTS[number]].tolist()

    for listed in summary.hottest_and_coldest(trace):
        assert all(one.expert < NUM_EXPERTS[one.layer] for one in listed)
    hottest = summary.hottest_and_coldest(trace)[0][0]
    counts_SE = trace.counts_SME[:, trace.layers.index(hottest.layer), : NUM_EXPERTS[hottest.layer]]
    load_S = counts_SE[:, hottest.expert] / counts_SE.mean(axis=1)
    assert hottest.mean == summary.number(load_S.mean())
    codes_SME = load_codes.encode(trace.counts_SME)
    assert ((codes_SME == 255) == (trace.counts_SME < 0)).all()
    values = {card.label: card.value for card in summary.cards(trace, hottest)}
    assert values["Dead experts"].endswith(f" of {sum(NUM_EXPERTS.values())}")
    assert render([trace])

    follower = Follower(folder)
    assert follower.look()
    console = Console(width=60, record=True, file=io.StringIO())
    console.print(frame(follower, 60))
    assert f"dead experts {(trace.counts_SME[-1] == 0).sum()}" in console.export_text()

    with pytest.raises(JobError, match="--from-run"):
        loads_of_run(trace, {})


def test_diagnose_and_place_count_the_experts_that_are_there():
    """Exactly one of the 8 experts of the smaller layer is dead."""
    counts_ME = np.full((2, 16), 400)
    counts_ME[0, 8:], counts_ME[0, 3] = ABSENT, 0
    info = run_info(layers=(1, 2), num_experts=16, num_experts_by_layer=(8, 16))
    trace = Trace(
        path=Path("moe_load.arrow"),
        info=info,
        steps=np.arange(8),
        counts_SME=np.stack([counts_ME] * 8),
        micro_batch_counts_SME=np.zeros((0, 2, 16)),
        layer_columns={},
        step_columns={},
        damage=(),
    )
    (found,) = diagnosis(trace).findings
    assert (found.kind, found.experts) == ("dead_experts", ((1, 3),))
    trace.counts_SME[:, 0, 3], trace.counts_SME[:, 0, 5] = 400, 4000
    (found,) = diagnosis(trace).findings
    assert (found.kind, found.experts) == ("hot_expert", ((1, 5),))
    order = placement_file.from_loads(counts_ME, (1, 2), 2, (), "").orders
    assert [sorted(order[number].tolist()) for number in (1, 2)] == [[*range(8)], [*range(16)]]


def test_a_recorded_run_is_replayed(run, ranks, tmp_path):
    folder, _biases = run
    replayed = Replay.Config(trace=str(folder))
    rows = read_trace(folder).info.global_batch_size
    settings = {"training.steps": 2, "training.global_batch_size": rows}
    ranks.run(1, train_mixed, str(tmp_path), settings, forced_routing=replayed)
    counts_SME = read_trace(tmp_path).counts_SME
    assert (counts_SME == read_trace(folder).counts_SME[[1, 1]]).all()


def test_a_resumed_run_goes_on_with_each_layers_own(ranks, tmp_path):
    saves = {"checkpoint.enable": True, "checkpoint.interval": 2}
    ranks.run(1, train_mixed, str(tmp_path), saves | {"training.steps": 2})
    again = saves | {"checkpoint.load_step": 2}
    biases = merged(ranks.run(1, train_mixed, str(tmp_path), again))
    trace = read_trace(tmp_path)
    assert trace.steps.tolist() == [1, 2, 3, 4] and trace.info.resumed_at == (3,)
    require_own_rules(trace, biases)


def test_a_number_of_experts_that_the_routed_experts_do_not_have_is_refused():
    """torchtitan would build such a model, and send tokens to experts that they did not choose."""
    spec = mixed_spec()
    spec.model.layers[2].moe.num_experts = 8
    with pytest.raises(JobError, match="layer 2 .*num_experts"):
        balanced(spec)


def test_a_top_k_that_the_dispatcher_does_not_have_is_refused():
    spec = balanced(mixed_spec())
    spec.model.layers[2].moe.router.top_k = 2
    with pytest.raises(JobError, match="layer 2 .*top_k"):
        layers_count_their_experts_alike(spec.model)
