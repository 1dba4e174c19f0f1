"""Config functions of GPT-OSS, under the names that torchtitan's users know."""

from __future__ import annotations

from torchtitan.components.loss import BaseLoss
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.trainer import Trainer

from model_registry import recipes
from model_registry.gpt_oss import model_registry

debug_config = "gpt_oss_debugmodel"
"""The job that runs when none is named."""


def loss_config(spec: ModelSpec) -> BaseLoss.Config:
    """The language-model loss that fits a model of this registry entry."""
    return recipes.language_model_loss(spec)


def gpt_oss_tiny() -> Trainer.Config:
    """A few seconds on a laptop: for tests. Longer than the sliding window."""
    return _debug("tiny")


def gpt_oss_debugmodel() -> Trainer.Config:
    """4 layers of 8 experts, on text that comes with Python."""
    return _debug("debugmodel", local_batch_size=4)


def gpt_oss_20b() -> Trainer.Config:
    """20.9B parameters, experts over 8 ranks."""
    return _pretraining("20b", "./assets/hf/gpt-oss-20b")


def gpt_oss_120b() -> Trainer.Config:
    """116.8B parameters, experts over 8 ranks."""
    return _pretraining("120b", "./assets/hf/gpt-oss-120b")


def _debug(flavor: str, **sizes: int) -> Trainer.Config:
    spec = model_registry(flavor)
    return recipes.debug(spec, loss_config(spec), **sizes)


def _pretraining(flavor: str, assets: str) -> Trainer.Config:
    spec = model_registry(flavor)
    return recipes.pretraining(
        spec,
        loss_config(spec),
        assets=assets,
        # The model card has no learning rates; this is DeepSeek-V3's peak, like the warm-up.
        learning_rate=2.2e-4,
        expert_parallel=8,  # the GPUs of a node
    )
