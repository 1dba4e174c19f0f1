"""Train a torchtitan model that has no room here on text. One rank."""

from __future__ import annotations

import importlib

from torchtitan.models.deepseek_v3 import MTPLoss
from torchtitan.protocols.model_spec import ModelSpec

from model_registry import recipes
from tests.train_jobs import train_config
from titan_moe_lb.expert_bias import SignBias
from titan_moe_lb.losses import GlobalBatchAuxLoss
from titan_moe_lb.model_spec import balanced
from titan_moe_lb.router import moe_layers_of
from titan_moe_lb.upstream import cpu


def upstream_spec(module: str, flavor: str, **arguments) -> ModelSpec:
    """A ``ModelSpec`` of torchtitan's own."""
    return importlib.import_module(f"torchtitan.models.{module}").model_registry(
        flavor, **arguments
    )


def train_with_own_hook() -> tuple[list[tuple[int, int]], float]:
    """One step of a model whose spec has a ``post_optimizer_build_fn`` of the user's own.

    Returns:
        For each call of the hook how many optimizers and model parts it was given; and the
        largest difference between two experts' biases.
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


def train_balanced(
    module: str, flavor: str, arguments: dict, *, steps: int
) -> list[dict[str, float]]:
    """What is logged; one dict for each step."""
    spec = upstream_spec(module, flavor, **arguments)
    spec = balanced(spec, aux_losses=[GlobalBatchAuxLoss.Config(weight=1e-2)])
    loss = (
        MTPLoss.Config(global_vocab_size=spec.model.vocab_size)
        if arguments.get("num_mtp_layers")
        else recipes.language_model_loss(spec)
    )
    config = recipes.debug(spec, loss, local_batch_size=2)
    config.training.steps = steps
    config.debug.enable_structured_logging = False
    return train_config(config)
