"""A job whose step is its experts, as in a large model: the tiny DeepSeek-V3, experts 64 times as
wide."""

from __future__ import annotations

from torchtitan.trainer import Trainer

from model_registry.deepseek_v3 import config_registry

HIDDEN_DIM = 2048


def wide_experts() -> Trainer.Config:
    """Experts take nine tenths of the products of its step."""
    config = config_registry.deepseek_v3_tiny()
    for layer in config.model_spec.model.layers:
        if layer.moe is not None:
            layer.moe.routed_experts.inner_experts.hidden_dim = HIDDEN_DIM
    return config
