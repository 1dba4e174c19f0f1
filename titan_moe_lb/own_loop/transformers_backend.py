"""Load balancing of the Hugging Face models of torchtitan's ``transformers_modeling_backend``."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from torch import nn

from titan_moe_lb.balancing.checkpointing import saving_decisions
from titan_moe_lb.balancing.expert_bias import ExpertBias
from titan_moe_lb.balancing.freezing import Freeze, freeze_gates
from titan_moe_lb.balancing.losses import AuxLoss
from titan_moe_lb.balancing.router import moe_layers_of
from titan_moe_lb.balancing.score_functions import ScoreFunction
from titan_moe_lb.errors import JobError
from titan_moe_lb.wiring.converter import LoadBalanceConverter


def balanced_transformers(
    spec: Any,
    *,
    aux_losses: list[AuxLoss.Config] | None = None,
    expert_bias: ExpertBias.Config | None | Literal["keep"] = "keep",
    score_func: ScoreFunction | Literal["keep"] = "keep",
    freeze: Freeze | None = None,
) -> Any:
    """Add balanced routers to the MoE layers of a Hugging Face model.

    :func:`titan_moe_lb.balanced` does so for torchtitan's own models. Build the trainer from the
    result, then call :func:`titan_moe_lb.attach`. The config of a Hugging Face model has no MoE
    layer: torchtitan replaces the model's layers when it parallelizes the model.

    Args:
        spec: a ``ModelSpec`` of ``torchtitan.experiments.transformers_modeling_backend``; it is not
            changed.
        aux_losses: losses of every router; None for none.
        expert_bias: as in :func:`titan_moe_lb.balanced`.
        score_func: as there.
        freeze: as there; without pipeline parallelism.

    Raises:
        JobError: no layer of the model is replaced, or a layer to freeze does not exist; raised when
            the trainer is built.
    """
    converter = LoadBalanceConverter.Config(
        aux_losses=aux_losses or [],
        expert_bias=expert_bias,
        score_func=score_func,
        freeze=freeze,
    ).build()

    def parallelize(model: nn.Module, **arguments: Any) -> nn.Module:
        in_pipeline = arguments["parallel_dims"].pp_enabled
        if in_pipeline and freeze is not None:  # a stage does not know the layers of the others
            raise JobError("freeze of a Hugging Face model needs pipeline_parallel_degree = 1")
        layers = model.layers.items()  # type: ignore[operator,union-attr]
        found = {name: getattr(layer, "_native_moe_config", None) for name, layer in layers}
        configs = {f"layers.{name}.mlp": moe for name, moe in found.items() if moe is not None}
        if not configs and not in_pipeline:
            raise JobError(
                f"torchtitan finds no MoE layer in {model.config.architectures[0]}: "  # type: ignore
                "choose a MoE model, or a flavor with a TitanMoeModelConfig"
            )
        converter.convert_layers(configs, {name: int(name.split(".")[1]) for name in configs})
        model = spec.parallelize_fn(model, **arguments)
        freeze_gates(model)
        return model

    return dataclasses.replace(
        spec, parallelize_fn=saving_decisions(parallelize), post_optimizer_build_fn=_initialize
    )


def _initialize(_optimizers: Any, model_parts: list[nn.Module], _parallel_dims: Any) -> None:
    """Initialize the MoE layers, before a checkpoint is loaded.

    Upstream fact: the backend initializes the modules of Hugging Face's classes alone.
    """
    for layer in moe_layers_of(model_parts):
        layer.init_states()
