"""A job's model, bound and built without weights: what a checkpoint for it has to hold."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torchtitan.protocols.model import BaseModel
from torchtitan.trainer import Trainer


def meta_model(config: Trainer.Config) -> tuple[BaseModel.Config, nn.Module]:
    """The config of a copy of the model that is bound to the job, and the model on no device."""
    assert config.model_spec is not None
    model_config = copy.deepcopy(config.model_spec.model)
    model_config.update_from_config(config=config)
    with torch.device("meta"):
        return model_config, model_config.build()


def meta_state(config: Trainer.Config) -> tuple[BaseModel.Config, dict[str, Any]]:
    """As :func:`meta_model`, with the model's state."""
    model_config, model = meta_model(config)
    return model_config, model.state_dict()
