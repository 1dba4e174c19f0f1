"""Training with an expert bias, which is returned. Every rank."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor
from torchtitan.trainer import Trainer

from tests.support.train_jobs import build
from titan_moe_lb.balancing.router import moe_layers_of
from titan_moe_lb.job import job_config


def biases_of_a_run(arguments: list[str]) -> dict[str, torch.Tensor]:
    """Train; return the biases of this rank's layers, each ``(N, E)``.

    Returns:
        ``loaded``: before the first step; ``trained``: after the last step.
    """
    config = job_config.load(["--debug.no-enable-structured-logging", *arguments]).config
    trainer = build(config)
    found: dict[str, torch.Tensor] = {}
    first_step = trainer.train_step

    def train_step(data_iterator) -> None:
        found.setdefault("loaded", _biases(trainer))
        first_step(data_iterator)

    trainer.train_step = train_step
    trainer.train()
    found["trained"] = _biases(trainer)
    trainer.close()
    return found


def _biases(trainer: Trainer) -> torch.Tensor:
    rows = [layer.expert_bias_E for layer in moe_layers_of(trainer.model_parts)]
    return torch.stack([b.full_tensor() if isinstance(b, DTensor) else b for b in rows]).clone()
