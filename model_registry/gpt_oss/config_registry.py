"""Config functions of GPT-OSS, with torchtitan's names."""

from __future__ import annotations

from model_registry import recipes
from model_registry.gpt_oss import model_registry

debug_config = "gpt_oss_debugmodel"
"""Config function of the default job."""


def gpt_oss_tiny():
    """Tiny model for tests, with sequences longer than its window; a few seconds on a laptop."""
    return recipes.debug(model_registry("tiny"))


def gpt_oss_debugmodel():
    """Debug model: 4 layers of 8 experts, on text that comes with Python."""
    return recipes.debug(model_registry("debugmodel"), local_batch_size=4)


def gpt_oss_20b():
    """20.9B parameters, experts over 8 ranks."""
    return recipes.pretraining(model_registry("20b"), assets="./assets/hf/gpt-oss-20b")


def gpt_oss_120b():
    """116.8B parameters, experts over 8 ranks."""
    return recipes.pretraining(model_registry("120b"), assets="./assets/hf/gpt-oss-120b")
