"""Train a torchtitan model that has no room here on text. One rank."""

from __future__ import annotations

import importlib

from torchtitan.models.deepseek_v3 import MTPLoss
from torchtitan.protocols.model_spec import ModelSpec

from model_registry import recipes
from tests.train_jobs import train_config
from titan_moe_lb.losses import GlobalBatchAuxLoss
from titan_moe_lb.model_spec import balanced


def upstream_spec(module: str, flavor: str, **arguments) -> ModelSpec:
    """A ``ModelSpec`` of torchtitan's own."""
    return importlib.import_module(f"torchtitan.models.{module}").model_registry(
        flavor, **arguments
    )


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
