"""Config functions of Qwen3 MoE."""

from __future__ import annotations

from torchtitan.components.loss import BaseLoss
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.trainer import Trainer

from model_registry import recipes
from model_registry.qwen3 import model_registry

debug_config = "qwen3_debugmodel_moe"
"""The job that runs when none is named."""


def loss_config(spec: ModelSpec) -> BaseLoss.Config:
    """The language-model loss that fits a model of this registry entry."""
    return recipes.language_model_loss(spec)


def qwen3_tiny() -> Trainer.Config:
    """A few seconds on a laptop: for tests."""
    return _debug("tiny", seq_len=128)


def qwen3_debugmodel_moe() -> Trainer.Config:
    """8 layers of 64 experts, on text that comes with Python."""
    return _debug("debugmodel_moe", local_batch_size=4)


def qwen3_30b_a3b() -> Trainer.Config:
    """30.5B parameters, experts over 8 ranks."""
    return _pretraining("30B-A3B", "./assets/hf/Qwen3-30B-A3B")


def qwen3_235b_a22b() -> Trainer.Config:
    """235B parameters, experts over 8 ranks."""
    return _pretraining("235B-A22B", "./assets/hf/Qwen3-235B-A22B")


def _debug(flavor: str, **sizes: int) -> Trainer.Config:
    spec = model_registry(flavor)
    return recipes.debug(spec, loss_config(spec), **sizes)


def _pretraining(flavor: str, assets: str) -> Trainer.Config:
    spec = model_registry(flavor)
    return recipes.pretraining(
        spec,
        loss_config(spec),
        assets=assets,
        # The report has no learning rates; this is DeepSeek-V3's peak, like the warm-up.
        learning_rate=2.2e-4,
        expert_parallel=8,  # the GPUs of a node
    )
