"""Config functions of Qwen3 MoE."""

from __future__ import annotations

from model_registry import recipes
from model_registry.qwen3 import model_registry

debug_config = "qwen3_debugmodel_moe"
"""Config function of the default job."""


def qwen3_tiny():
    """Tiny model for tests; a few seconds on a laptop."""
    return recipes.debug(model_registry("tiny"), seq_len=128)


def qwen3_debugmodel_moe():
    """Debug model: 8 layers of 64 experts, on text that comes with Python."""
    return recipes.debug(model_registry("debugmodel_moe"), local_batch_size=4)


def qwen3_30b_a3b():
    """30.5B parameters, experts over 8 ranks."""
    return recipes.pretraining(model_registry("30B-A3B"), assets="./assets/hf/Qwen3-30B-A3B")


def qwen3_235b_a22b():
    """235B parameters, experts over 8 ranks."""
    return recipes.pretraining(model_registry("235B-A22B"), assets="./assets/hf/Qwen3-235B-A22B")
