"""Models of torchtitan that have no room here: one line balances them."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torchtitan.components.optimizer import register_moe_load_balancing_hook
from torchtitan.models import deepseek_v3
from torchtitan.models.common.moe import MoE

from model_registry import recipes
from tests.other_models import train_balanced, train_with_own_hook, upstream_spec
from titan_moe_lb.converter import LoadBalanceConverter
from titan_moe_lb.errors import JobError
from titan_moe_lb.expert_bias import SignBias
from titan_moe_lb.job import job_config
from titan_moe_lb.losses import GlobalBatchAuxLoss, SequenceWiseAuxLoss
from titan_moe_lb.model_spec import balanced
from titan_moe_lb.router import LoadBalancedRouter

LOSSES = [GlobalBatchAuxLoss.Config(weight=1e-2)]
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
    layers = list(upstream_spec(module, flavor, **arguments).model.traverse(MoE.Config))
    spec = balanced(upstream_spec(module, flavor, **arguments), aux_losses=LOSSES)
    routers = list(spec.model.traverse(LoadBalancedRouter.Config))
    assert len(routers) == len(layers) > 1

    ((first, second),) = ranks.run(1, train_balanced, module, flavor, arguments, steps=2)
    assert math.isfinite(second["loss_metrics/global_avg_loss"])
    # The first step has no counts of a step before it, so that the loss is 1 by definition.
    assert first["moe/global_load_balancing_loss"] == pytest.approx(1.0, abs=1e-3)
    assert second["moe/global_load_balancing_loss"] > 1.0
    assert second["moe/max_violation"] > 0


def test_a_hook_of_the_users_own_is_chained(ranks):
    """And the bias moves by the one rule alone: from -speed to +speed, whatever its mean."""
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
        router.score_func = "sqrtsoftplus"
    config = recipes.debug(spec, recipes.language_model_loss(spec))
    with pytest.raises(JobError, match="score_func is 'sqrtsoftplus'; the router knows"):
        spec.model.update_from_config(config=config)


def test_qwen3_5():
    """Its linear attention needs the package fla, and a GPU; its MoE layers run anywhere."""
    losses = [SequenceWiseAuxLoss.Config(weight=1e-2)]
    spec = balanced(upstream_spec("qwen3_5", "debugmodel_moe"), aux_losses=losses)
    spec.model.update_from_config(config=recipes.debug(spec, recipes.language_model_loss(spec)))
    with torch.device("meta"):
        model = spec.model.build()
    assert sum(isinstance(module, LoadBalancedRouter) for module in model.modules()) == 4
    moe = spec.model.layers[0].moe.build()
    moe.init_states()
    moe(torch.randn(2, 64, spec.model.dim)).sum().backward()
    assert moe.router.gate.weight.grad.abs().max() > 0
    assert moe.router.recorder.counts_MSE.sum() == 2 * 64 * moe.router.top_k


@pytest.mark.parametrize(("module", "package"), [("qwen3_5", "fla"), ("kimi_k2_7", "torchvision")])
def test_missing_package_is_one_line(monkeypatch, module, package):
    """Their config functions read images; Qwen3.5 has kernels of another package."""
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
