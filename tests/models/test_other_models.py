"""Tests of torchtitan's models without a package here: one line balances them."""

from __future__ import annotations

import sys

import pytest
import torch
from torchtitan.components.optimizer import register_moe_load_balancing_hook
from torchtitan.models import deepseek_v3
from torchtitan.models.common.moe import MoE

from model_registry import recipes
from tests.support.other_models import (
    train_balanced,
    train_upstream,
    train_with_own_hook,
    upstream_spec,
)
from tests.support.routers import wired
from tests.support.textbook import mean_loss, sequence_counts
from titan_moe_lb.balancing.expert_bias import SignBias
from titan_moe_lb.balancing.losses import GlobalBatchAuxLoss, SequenceWiseAuxLoss
from titan_moe_lb.balancing.router import LoadBalancedRouter
from titan_moe_lb.errors import JobError
from titan_moe_lb.job import job_config
from titan_moe_lb.wiring.converter import LoadBalanceConverter
from titan_moe_lb.wiring.model_spec import balanced

LOSSES = [GlobalBatchAuxLoss.Config(weight=1e-2)]
LOSS = "global_load_balancing_loss"
MULTI_TOKEN_PREDICTION = {"num_mtp_layers": 2}


@pytest.mark.parametrize(
    ("module", "flavor", "arguments"),
    [
        ("deepseek_v3", "debugmodel", MULTI_TOKEN_PREDICTION),
        ("kimi_k2_7", "debugmodel", {}),
    ],
    ids=["DeepSeek-V3 with MTP", "Kimi K2.7"],
)
def test_one_line_balances_every_layer_and_trains(ranks, module, flavor, arguments):
    """The numbers of each layer, MTP layers included, equal the choices of torchtitan's own
    model."""
    layers = list(upstream_spec(module, flavor, **arguments).model.traverse(MoE.Config))
    # So small a weight leaves the second step what it is in torchtitan.
    loss = GlobalBatchAuxLoss.Config(weight=1e-9)
    ((expected, chosen),) = ranks.run(1, train_upstream, module, flavor, arguments)
    (logged,) = ranks.run(1, train_balanced, module, flavor, arguments, loss)

    assert [len(step) for step in chosen] == [len(layers)] * 2 and len(layers) > 1
    counts_SME = [
        [sequence_counts(ids, scores.shape[-1]).sum(dim=0) for scores, ids in step]
        for step in chosen
    ]
    for step, metrics in enumerate(logged):
        for name in ("loss_metrics/global_avg_loss", "grad_norm"):
            assert metrics[name] == pytest.approx(expected[step][name], rel=1e-5)
        violations = [(counts.max() / counts.mean() - 1).item() for counts in counts_SME[step]]
        assert by_layer(metrics, "max_violation") == pytest.approx(violations, rel=1e-6)
    # The first step has no counts of a step before it, so that the loss is 1 by definition.
    assert by_layer(logged[0], LOSS) == pytest.approx([1.0] * len(layers), abs=1e-5)
    textbook = [
        mean_loss("global_batch", None, scores, ids, counts).item()
        for (scores, ids), counts in zip(chosen[1], counts_SME[0], strict=True)
    ]
    assert by_layer(logged[1], LOSS) == pytest.approx(textbook, rel=1e-4)
    assert max(textbook) > 1.001


def by_layer(metrics: dict[str, float], name: str) -> list[float]:
    prefix = f"moe/{name}_layer_"
    found = {int(key[len(prefix) :]): metrics[key] for key in metrics if key.startswith(prefix)}
    return [found[layer] for layer in sorted(found)]


def test_a_hook_of_the_users_own_is_chained(ranks):
    """The bias moves by our rule alone: from -speed to +speed, whatever its mean."""
    ((calls, spread),) = ranks.run(1, train_with_own_hook)
    assert calls == [(1, 1)]
    assert spread == pytest.approx(2 * 0.5)


def test_torchtitans_own_bias_update_is_replaced():
    spec = upstream_spec("deepseek_v3", "debugmodel")
    assert spec.post_optimizer_build_fn is register_moe_load_balancing_hook
    calls = []
    assert balanced(spec).post_optimizer_build_fn.own is None
    spec = upstream_spec("deepseek_v3", "debugmodel")
    spec.post_optimizer_build_fn = lambda *arguments: calls.append(arguments)
    balanced(spec).post_optimizer_build_fn(None, [], None)
    assert calls == [(None, [], None)]


@pytest.mark.parametrize("rule", [1e-3, [SignBias.Config()], "none"])
def test_balanced_takes_one_bias_rule(rule):
    with pytest.raises(JobError, match="expert_bias is .*; a model has one rule"):
        balanced(upstream_spec("deepseek_v3", "debugmodel"), expert_bias=rule)


def test_unknown_score_function_is_one_line():
    spec = balanced(upstream_spec("deepseek_v3", "debugmodel"))
    for _fqn, router, *_ in spec.model.traverse(LoadBalancedRouter.Config):
        router.score_func = "tanh"
    config = recipes.debug(spec, recipes.language_model_loss(spec))
    with pytest.raises(JobError, match="score_func of layer .* is 'tanh'; the router knows"):
        spec.model.update_from_config(config=config)


def test_qwen3_5():
    """Its linear attention needs the package fla and a GPU; its MoE layers run anywhere."""
    weight = 0.5
    losses = [SequenceWiseAuxLoss.Config(weight=weight)]
    spec = balanced(upstream_spec("qwen3_5", "debugmodel_moe"), aux_losses=losses)
    config = recipes.debug(spec, recipes.language_model_loss(spec), local_batch_size=2, seq_len=64)
    spec.model.update_from_config(config=config)
    with torch.device("meta"):
        model = spec.model.build()
    assert sum(isinstance(module, LoadBalancedRouter) for module in model.modules()) == 4

    moe = spec.model.layers[0].moe.build()
    moe.init_states()
    wired(moe.router, rows=2)
    theirs = upstream_spec("qwen3_5", "debugmodel_moe").model.layers[0].moe.build()
    theirs.load_state_dict(moe.state_dict(), strict=False)
    seen = []
    theirs.router.register_forward_hook(lambda _router, _inputs, out: seen.append(out))
    x_BLD = torch.randn(2, 64, spec.model.dim, generator=torch.Generator().manual_seed(2))

    out_BLD, expected_BLD = moe(x_BLD), theirs(x_BLD)
    torch.testing.assert_close(out_BLD, expected_BLD, rtol=0, atol=0)
    _topk, ids_BLK, scores_BLE = seen[0]
    textbook = mean_loss("sequence_wise", None, scores_BLE, ids_BLK, None)
    out_BLD.square().sum().backward()
    (expected_BLD.square().sum() + weight * textbook).backward()
    gradient, expected = moe.router.gate.weight.grad, theirs.router.gate.weight.grad
    torch.testing.assert_close(
        gradient, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item()
    )
    counts_E = sequence_counts(ids_BLK, scores_BLE.shape[-1]).sum(dim=0)
    assert (moe.router.record.counts_MSE[0, 0] == counts_E).all()


@pytest.mark.parametrize(("module", "package"), [("qwen3_5", "fla"), ("kimi_k2_7", "torchvision")])
def test_missing_package_is_one_line(monkeypatch, module, package):
    """Their config functions read images; Qwen3.5 needs kernels of another package."""
    for name in list(sys.modules):
        if name.startswith((f"torchtitan.models.{module}", "torchtitan.hf_datasets.multimodal")):
            monkeypatch.delitem(sys.modules, name)
        if name.startswith(f"{package}."):
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(JobError, match=f"{module}.* needs the package '{package}', which is not"):
        job_config.load(["--module", module, "--config", "debugmodel"])


def test_converter_without_the_step_hook_is_refused():
    converter = LoadBalanceConverter.Config(aux_losses=LOSSES)
    spec = deepseek_v3.model_registry("debugmodel", converters=[converter])
    config = recipes.debug(spec, recipes.language_model_loss(spec))
    with pytest.raises(JobError, match=r"use titan_moe_lb\.balanced\(spec"):
        spec.model.update_from_config(config=config)
