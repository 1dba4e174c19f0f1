"""Layers that differ: without a bias, with a speed, a top_k or a number of experts of their own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchtitan.config import TrainingConfig
from torchtitan.models.common.moe import MoE
from torchtitan.models.deepseek_v3 import model_registry

from tests.mixed_jobs import NUM_EXPERTS, SPEEDS, TOP_K, train_mixed
from tests.telemetry_jobs import DeviceOperators, forward_and_backward, moe_layers
from titan_moe_lb import attach, build_model
from titan_moe_lb.model_spec import balanced
from titan_moe_lb.router import moe_layers_of
from titan_moe_lb.step_hook import StepHook, wire
from titan_moe_lb.traces.trace import read_trace

RULES = ["sign", "proportional", "momentum", "quantile", "quantile_trend"]
TOKENS = torch.randint(0, 256, (2, 64), generator=torch.Generator().manual_seed(1))


def sign_rule(counts_SE: np.ndarray, speed: float) -> np.ndarray:
    """torchtitan's: ``b_i += u (sign(mean n - n_i) - mean)``, over S steps."""
    signs_SE = np.sign(counts_SE.mean(axis=1, keepdims=True) - counts_SE)
    return speed * (signs_SE - signs_SE.mean(axis=1, keepdims=True)).sum(axis=0)


@pytest.mark.parametrize(
    "speeds",
    [
        [None, 1e-3, 1e-3, 1e-3, 1e-3],
        [1e-3, 1e-2, 1e-3, 1e-3, 1e-3],
        [1e-3, None, 1e-3, None, 1e-3],
        [1e-3, 2e-3, 3e-3, 4e-3, 5e-3],
    ],
)
def test_each_layer_keeps_its_own_speed_in_a_loop(speeds):
    """Against the rule on what the routers have answered."""
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
    """Layers with 8 and 16 experts, top 2, 1 and 4; some have neither bias nor rule."""
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
    hooks = [StepHook(together, wire([layer.router for layer in together], None), None)]
    for layer in alone:
        record = wire([layer.router], None)
        assert record is not None
        hooks.append(StepHook([layer], record, None))
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
        hook = StepHook(layers, wire([layer.router for layer in layers], None), None)
        forward_and_backward(layers)
        with DeviceOperators() as operators:
            hook.close_step()
        counts.append(operators.count)
    assert counts[0] == counts[1]


LAYOUTS = {
    "one rank": (1, {}),
    "pipeline and experts": (
        4,
        {"pipeline_parallel_degree": 2, "expert_parallel_degree": 2},
    ),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def run(request, ranks, tmp_path_factory):
    """The folder of a run of a model whose layers differ, and the biases that it ends with."""
    num_ranks, layout = LAYOUTS[request.param]
    folder = tmp_path_factory.mktemp("mixed")
    found = ranks.run(num_ranks, train_mixed, str(folder), layout)
    biases: dict[int, list[float]] = {}
    for rank in found:
        for number, bias_E in rank.items():
            assert biases.setdefault(number, bias_E) == bias_E
    return folder, biases


def test_each_layer_keeps_its_own_under_the_trainer(run):
    folder, biases = run
    trace = read_trace(folder)
    info = trace.info
    assert trace.layers == tuple(SPEEDS)
    assert dict(zip(trace.layers, info.num_experts_M.tolist(), strict=True)) == NUM_EXPERTS
    assert dict(zip(trace.layers, info.top_k_M.tolist(), strict=True)) == TOP_K
    assert biases.keys() == {number for number, speed in SPEEDS.items() if speed is not None}
    tokens = info.global_batch_size * info.seq_len
    for row, number in enumerate(trace.layers):
        counts_SE = trace.counts_SME[:, row, : NUM_EXPERTS[number]]
        assert (trace.counts_SME[:, row, NUM_EXPERTS[number] :] == -1).all()
        assert (counts_SE.sum(axis=1) == TOP_K[number] * tokens).all()
        violation_S = counts_SE.max(axis=1) / counts_SE.mean(axis=1) - 1
        single_S = trace.figures["micro_batch_max_violation"][:, row]
        assert (single_S >= violation_S - 1e-9).all()
        range_S = trace.figures["bias_range"][:, row]
        if SPEEDS[number] is None:
            assert np.isnan(range_S).all()
        else:
            expected_E = sign_rule(counts_SE, SPEEDS[number])
            assert biases[number] == pytest.approx(expected_E, abs=1e-7)
            assert range_S[-1] == pytest.approx(np.ptp(expected_E), rel=1e-5)
