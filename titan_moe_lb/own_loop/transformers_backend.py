"""Balance for the Hugging Face models of torchtitan's ``transformers_modeling_backend``."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from torch import nn
from torchtitan.protocols.model_spec import ModelSpec

from titan_moe_lb.balancing.checkpointing import saving_decisions
from titan_moe_lb.balancing.expert_bias import ExpertBias
from titan_moe_lb.balancing.losses import AuxLoss
from titan_moe_lb.balancing.router import moe_layers_of
from titan_moe_lb.errors import JobError
from titan_moe_lb.wiring.converter import LoadBalanceConverter


def balanced_transformers(
    spec: ModelSpec,
    *,
    aux_losses: list[AuxLoss.Config] | None = None,
    expert_bias: ExpertBias.Config | None | Literal["keep"] = "keep",
) -> ModelSpec:
    """What :func:`titan_moe_lb.balanced` is for torchtitan's own models. The trainer is built from
    it, and then :func:`titan_moe_lb.own_loop.attach.attach` is called.

    The config of such a model has no MoE layer: torchtitan reads the layers off the Hugging Face
    model once that is built, and puts its own in their place when it parallelizes.

    Args:
        spec: of ``torchtitan.experiments.transformers_modeling_backend``; stays as it is.

    Raises:
        JobError: when the trainer is built: no layer of the model is replaced.
    """
    converter = LoadBalanceConverter.Config(
        aux_losses=aux_losses or [], expert_bias=expert_bias
    ).build()

    def parallelize(model: nn.Module, **arguments: Any) -> nn.Module:
        found = 0
        for name, layer in model.layers.items():  # type: ignore[operator,union-attr]
            config = getattr(layer, "_native_moe_config", None)
            if config is not None:
                converter.convert_layer(f"layers.{name}.mlp", config, int(name))
                found += 1
        if not found and not arguments["parallel_dims"].pp_enabled:
            raise JobError(
                f"torchtitan finds no MoE layer in {model.config.architectures[0]}: "  # type: ignore
                "choose a MoE model, or a flavor with a TitanMoeModelConfig"
            )
        return spec.parallelize_fn(model, **arguments)

    return dataclasses.replace(
        spec, parallelize_fn=saving_decisions(parallelize), post_optimizer_build_fn=_initialize
    )


def _initialize(_optimizers: Any, model_parts: list[nn.Module], _parallel_dims: Any) -> None:
    """Upstream fact: the backend initializes what Hugging Face's classes know, and leaves the MoE
    layers, with the expert bias, to what the memory held. Before a checkpoint is loaded."""
    for layer in moe_layers_of(model_parts):
        layer.init_states()
