"""Config functions of a user: torchtitan's configs around a balanced spec."""

from __future__ import annotations

import dataclasses

from torchtitan.components.lora import LoRAConverter, _make_frozen_config
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.config.override import derive
from torchtitan.trainer import Trainer

from model_registry.deepseek_v3 import config_registry
from titan_moe_lb import SequenceWiseAuxLoss, balanced

ADAPTERS = LoRAConverter.Config(rank=4, alpha=8.0, target_modules=["wq", "wo"])


class OwnMetrics(MetricsProcessor):
    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        pass


def _tiny() -> Trainer.Config:
    config = config_registry.deepseek_v3_tiny()
    config.metrics = derive(config.metrics, MetricsProcessor.Config)
    return config


def without_a_model() -> Trainer.Config:
    return Trainer.Config()


def torchtitans_metrics() -> Trainer.Config:
    config = _tiny()
    config.model_spec = balanced(
        config.model_spec, aux_losses=[SequenceWiseAuxLoss.Config(weight=1e-3)]
    )
    return config


def metrics_of_ones_own() -> Trainer.Config:
    config = torchtitans_metrics()
    config.metrics = derive(config.metrics, OwnMetrics.Config)
    return config


def adapters_before() -> Trainer.Config:
    """Add adapters, then balance."""
    config = _tiny()
    config.model_spec = balanced(
        config.model_spec,
        aux_losses=[SequenceWiseAuxLoss.Config(weight=1e-3)],
        converters=[ADAPTERS],
    )
    return config


def adapters_after() -> Trainer.Config:
    """Balance, then add adapters."""
    config = torchtitans_metrics()
    spec = config.model_spec
    model = ADAPTERS.build().convert(spec.model)
    config.model_spec = dataclasses.replace(spec, model=model)
    return config


def adapters_late() -> Trainer.Config:
    """Add adapters so that no parameter at or before the first router learns; its shared experts
    come first."""
    config = torchtitans_metrics()
    late = dataclasses.replace(ADAPTERS, target_modules=["w2"])
    plain = config.model_spec.model.layers[0].feed_forward.w2
    model = late.build().convert(config.model_spec.model)
    model.layers[0].feed_forward.w2 = _make_frozen_config(plain)
    config.model_spec = dataclasses.replace(config.model_spec, model=model)
    return config
