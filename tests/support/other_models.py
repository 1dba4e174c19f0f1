"""Training of models that no job file can configure: no package here, or many experts."""

from __future__ import annotations

import importlib
from typing import Any
from unittest.mock import patch

import torch
from torchtitan.models.common.moe import MoE, TokenChoiceTopKRouter
from torchtitan.models.deepseek_v3 import MTPLoss
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.trainer import Trainer

from model_registry import deepseek_v3, recipes
from tests.support.train_jobs import train, train_config
from titan_moe_lb.balancing.expert_bias import SignBias
from titan_moe_lb.balancing.losses import AuxLoss
from titan_moe_lb.balancing.router import moe_layers_of
from titan_moe_lb.upstream import cpu
from titan_moe_lb.wiring.model_spec import balanced


def upstream_spec(module: str, flavor: str, **arguments) -> ModelSpec:
    """Make torchtitan's own ``ModelSpec``."""
    return importlib.import_module(f"torchtitan.models.{module}").model_registry(
        flavor, **arguments
    )


def train_with_own_hook() -> tuple[list[tuple[int, int]], float]:
    """Train one step of a model whose spec has a user's own ``post_optimizer_build_fn``.

    Returns:
        For each call of the hook, the number of optimizers and model parts; and the largest
        difference between two experts' biases.
    """
    calls: list[tuple[int, int]] = []
    spec = upstream_spec("deepseek_v3", "debugmodel")
    spec.post_optimizer_build_fn = lambda optimizers, model_parts, parallel_dims: calls.append(
        (len(optimizers.optimizers), len(model_parts))
    )
    spec = balanced(spec, expert_bias=SignBias.Config(speed=0.5))
    config = recipes.debug(spec, recipes.language_model_loss(spec), local_batch_size=1)
    config.training.steps = 1
    config.debug.enable_structured_logging = False
    config.metrics.write_moe_trace = False
    cpu.adapt(config)
    trainer = config.build()
    trainer.train()
    biases = [layer.expert_bias_E for layer in moe_layers_of(trainer.model_parts)]
    trainer.close()
    return calls, max(float(bias.max() - bias.min()) for bias in biases)


def train_balanced(module: str, flavor: str, arguments: dict, loss: AuxLoss.Config) -> list[dict]:
    """Train two steps; return the log, with each layer's own numbers. One rank."""
    spec = balanced(upstream_spec(module, flavor, **arguments), aux_losses=[loss])
    config = _two_steps(spec, arguments)
    config.metrics.moe_per_layer_logging = True
    return train_config(config)


def train_upstream(
    module: str, flavor: str, arguments: dict
) -> tuple[list[dict], list[list[tuple[torch.Tensor, torch.Tensor]]]]:
    """Train two steps of torchtitan's own model, unchanged. One rank.

    Returns:
        The log; and for each step each router's scores ``(B, L, E)`` and chosen experts ``(B, L,
        K)``.
    """
    chosen: list[list[tuple[torch.Tensor, torch.Tensor]]] = []

    def note(trainer: Trainer) -> None:
        (model,) = trainer.model_parts
        model.register_forward_pre_hook(lambda *_: chosen.append([]))
        layers = [module for module in model.modules() if isinstance(module, MoE)]
        for layer in layers:
            assert type(layer.router) is TokenChoiceTopKRouter
            layer.router.register_forward_hook(
                lambda _router, _inputs, out: chosen[-1].append((out[2].detach(), out[1]))
            )
        # torchtitan's update of the bias goes through the decoder's layers alone.
        missed = layers[len(layers) - arguments.get("num_mtp_layers", 0) :]
        trainer.optimizers.register_step_pre_hook(lambda *_: update_bias(missed))

    def update_bias(missed: list[MoE]) -> None:
        for layer, (scores, ids) in zip(missed[::-1], chosen[-1][::-1], strict=False):
            counts_E = torch.bincount(ids.flatten(), minlength=scores.shape[-1]).float()
            sign_E = torch.sign(counts_E.mean() - counts_E)
            layer.expert_bias_E.add_(layer.load_balance_coeff * (sign_E - sign_E.mean()))

    spec = upstream_spec(module, flavor, **arguments)
    return train_config(_two_steps(spec, arguments), prepare=note), chosen


def _two_steps(spec: ModelSpec, arguments: dict) -> Trainer.Config:
    loss = (
        MTPLoss.Config(global_vocab_size=spec.model.vocab_size)
        if arguments.get("num_mtp_layers")
        else recipes.language_model_loss(spec)
    )
    config = recipes.debug(spec, loss, local_batch_size=2)
    config.training.steps = 2
    config.training.mixed_precision_param = "float32"
    config.debug.seed = 5
    config.debug.enable_structured_logging = False
    config.metrics.write_moe_trace = False
    return config


def train_with_experts(num_experts: int, arguments: list[str]) -> list[dict[str, float]]:
    """Train the tiny DeepSeek-V3 with more than its 8 experts; see
    :func:`tests.support.train_jobs.train`."""
    build = deepseek_v3.upstream.build_mla_moe_layers

    def layers(**settings: Any) -> list:
        return build(**{**settings, "num_experts": num_experts})

    with patch.object(deepseek_v3.upstream, "build_mla_moe_layers", layers):
        return train(arguments)
