"""Config functions of DeepSeek-V3, with torchtitan's names."""

from __future__ import annotations

from torchtitan.components.loss import BaseLoss
from torchtitan.models.common.config_utils import decoder_vocab_size
from torchtitan.models.deepseek_v3 import MTPLoss
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.trainer import Trainer

from model_registry import recipes
from model_registry.deepseek_v3 import model_registry

debug_config = "deepseek_v3_debugmodel"
"""Config function of the default job."""


def loss_config(spec: ModelSpec) -> BaseLoss.Config:
    """Return the language-model loss for a model of this registry entry."""
    if spec.model.mtp_layers:
        return MTPLoss.Config(global_vocab_size=decoder_vocab_size(spec))
    return recipes.language_model_loss(spec)


def deepseek_v3_tiny() -> Trainer.Config:
    """Tiny model for tests; a few seconds on a laptop."""
    return _debug("tiny", seq_len=128)


def deepseek_v3_debugmodel() -> Trainer.Config:
    """Debug model on text that comes with Python; under a minute on a laptop."""
    return _debug("debugmodel")


def deepseek_v3_debugmodel_mtp() -> Trainer.Config:
    """Debug model with one multi-token prediction layer."""
    return _debug("debugmodel", num_mtp_layers=1)


def deepseek_v3_16b() -> Trainer.Config:
    """16B parameters (DeepSeek-V2-Lite), experts over 8 ranks."""
    config = _pretraining("16B", "./assets/hf/DeepSeek-V2-Lite", learning_rate=4.2e-4)
    config.training.steps = 1000
    return config


def deepseek_v3_236b() -> Trainer.Config:
    """236B parameters (DeepSeek-V2), experts over 8 ranks."""
    return _pretraining("236B", "./assets/hf/DeepSeek-V2", learning_rate=2.4e-4)


def deepseek_v3_671b() -> Trainer.Config:
    """671B parameters, experts over 64 ranks."""
    return _pretraining("671B", "./assets/hf/DeepSeek-V3.1-Base", expert_parallel=64)


def _debug(flavor: str, *, seq_len: int = 256, **model_arguments) -> Trainer.Config:
    spec = model_registry(flavor, **model_arguments)
    return recipes.debug(spec, loss_config(spec), seq_len=seq_len)


def _pretraining(flavor: str, assets: str, **recipe) -> Trainer.Config:
    spec = model_registry(flavor)
    return recipes.pretraining(spec, loss_config(spec), assets=assets, **recipe)
