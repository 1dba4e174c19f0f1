"""Config functions of Llama 4."""

from __future__ import annotations

from torchtitan.distributed.activation_checkpoint import FullAC

from model_registry import recipes
from model_registry.llama4 import model_registry

debug_config = "llama4_debugmodel"
"""Config function of the default job."""


def llama4_tiny():
    """Tiny model for tests; a few seconds on a laptop."""
    return recipes.debug(model_registry("tiny"), seq_len=128)


def llama4_debugmodel():
    """Debug model on text that comes with Python; under a minute on a laptop."""
    return recipes.debug(model_registry("debugmodel"))


def llama4_17bx16e():
    """Scout: 109B parameters, 17B of them active, experts over 8 ranks."""
    return _pretraining(
        "17Bx16E", "./assets/hf/Llama-4-Scout-17B-16E", expert_parallel=8, seq_len=8192
    )


def llama4_17bx128e():
    """Maverick: 400B parameters, 17B of them active, experts over 128 ranks."""
    return _pretraining(
        "17Bx128E", "./assets/hf/Llama-4-Maverick-17B-128E", expert_parallel=128, seq_len=4096
    )


def _pretraining(flavor: str, assets: str, *, expert_parallel: int, seq_len: int):
    return recipes.pretraining(
        model_registry(flavor),
        assets=assets,
        expert_parallel=expert_parallel,
        seq_len=seq_len,
        activation_checkpoint=FullAC.Config(),
    )
