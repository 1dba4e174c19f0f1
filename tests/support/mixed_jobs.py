"""DeepSeek-V3 whose MoE layers differ, and its training."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torchtitan.models.common.moe import MoE
from torchtitan.models.deepseek_v3 import model_registry
from torchtitan.protocols.model_spec import ModelSpec

from model_registry import recipes
from tests.support.train_jobs import train_config
from titan_moe_lb.balancing.router import moe_layers_of
from titan_moe_lb.parallel.local_shard import local_shard
from titan_moe_lb.wiring.model_spec import balanced

SPEEDS = {1: None, 2: 1e-2, 3: 1e-3, 4: 1e-3, 5: 1e-3}
NUM_EXPERTS = {1: 8, 2: 16, 3: 8, 4: 16, 5: 8}
TOP_K = {1: 3, 2: 3, 3: 1, 4: 3, 5: 3}


def mixed_spec() -> ModelSpec:
    """Build torchtitan's debug model; layers have their own bias, speed, number of experts and
    top_k."""
    spec = model_registry("debugmodel")
    for number, layer in enumerate(spec.model.layers):
        if layer.moe is not None:
            layer.moe.load_balance_coeff = SPEEDS[number]
            layer.moe.router.top_k = TOP_K[number]
            set_num_experts(layer.moe, NUM_EXPERTS[number])
    return spec


def set_num_experts(moe: MoE.Config, number: int) -> None:
    moe.num_experts = moe.router.num_experts = moe.router.gate.out_features = number
    routed = moe.routed_experts
    routed.inner_experts.num_experts = routed.token_dispatcher.num_experts = number


def train_mixed(folder: str, settings: dict[str, Any], **arguments: Any) -> dict[int, list[float]]:
    """Train four steps of a job with a trace in ``folder``. Every rank.

    Args:
        settings: settings of the ``Trainer.Config``, by dotted name.
        arguments: arguments of ``balanced``.

    Returns:
        The biases of this rank's layers after the last step, by layer number.
    """
    spec = balanced(mixed_spec(), **arguments)
    config = recipes.debug(spec, recipes.language_model_loss(spec), local_batch_size=4)
    settings = {
        "training.steps": 4,
        "training.seq_len": 64,
        "debug.seed": 0,
        "debug.enable_structured_logging": False,
        "metrics.moe_per_layer_logging": True,
        "dump_folder": folder,
    } | settings
    for name, value in settings.items():
        *path, last = name.split(".")
        setattr(functools.reduce(getattr, path, config), last, value)
    parts: list[torch.nn.Module] = []
    train_config(
        config,
        prepare=lambda trainer: parts.extend(trainer.model_parts),
        first_step=settings.get("checkpoint.load_step", 0) + 1,
    )
    return {
        layer.router.layer: local_shard(layer.expert_bias_E).tolist()
        for layer in moe_layers_of(parts)
        if layer.expert_bias_E is not None
    }
