"""Job whose experts dominate the step, as in a large model.

It is the tiny DeepSeek-V3 with experts 64 times as wide.
"""

from __future__ import annotations

from torchtitan.trainer import Trainer

from model_registry.deepseek_v3 import config_registry

HIDDEN_DIM = 2048


def wide_experts() -> Trainer.Config:
    """Build the job; its experts do nine tenths of the matrix products of a step."""
    config = config_registry.deepseek_v3_tiny()
    for layer in config.model_spec.model.layers:
        if layer.moe is not None:
            layer.moe.routed_experts.inner_experts.hidden_dim = HIDDEN_DIM
    return config
