"""Training of jobs with frozen parts."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor

from tests.support.train_jobs import build, train_config
from titan_moe_lb.balancing.router import moe_layers_of
from titan_moe_lb.job import job_config
from titan_moe_lb.parallel.rank_groups import RankGroups
from titan_moe_lb.telemetry.reduction import reduce_step


class Trained(NamedTuple):
    """Layers of a rank before and after a run, and the load of its last step."""

    gates: dict[int, tuple[torch.Tensor, torch.Tensor]]
    biases: dict[int, tuple[torch.Tensor, torch.Tensor]]
    layers: tuple[int, ...]
    counts_ME: list[list[int]]
    losses: dict[str, list[float]]


def train_parts(arguments: list[str], first_step: int = 1) -> Trained:
    """Train a job; return the gates and biases of this rank's layers, and the last load."""
    config = job_config.load(["--debug.no-enable-structured-logging", *arguments]).config
    config.metrics.write_moe_trace = False
    kept: dict[str, Any] = {}

    def note(trainer) -> None:
        kept["trainer"], kept["before"] = trainer, None
        step = trainer.train_step

        def train_step(*args, **kwargs):
            if kept["before"] is None:  # after the checkpoint is loaded
                kept["before"] = _state(trainer.model_parts)
            step(*args, **kwargs)
            groups = RankGroups.of(trainer.parallel_dims)
            kept["load"] = reduce_step(moe_layers_of(trainer.model_parts), groups)

        trainer.train_step = train_step

    train_config(config, first_step=first_step, prepare=note)
    after, load = _state(kept["trainer"].model_parts), kept["load"]
    pairs = [
        {layer: (kept["before"][i][layer], after[i][layer]) for layer in after[i]} for i in (0, 1)
    ]
    losses = {name: column.tolist() for name, column in load.layer_columns.items()}
    return Trained(*pairs, load.layers, load.counts_ME.tolist(), losses)


def _state(parts: list[Any]) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]:
    layers = moe_layers_of(parts)
    return (
        {layer.router.layer: _whole(layer.router.gate.weight) for layer in layers},
        {layer.router.layer: _whole(layer.expert_bias_E) for layer in layers},
    )


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().clone()


def train_with_trace(arguments: list[str]) -> dict[int, float]:
    """Train a job that writes its trace; return the squared norms of the gates of this rank."""
    config = job_config.load(["--debug.no-enable-structured-logging", *arguments]).config
    trainer = build(config)
    trainer.train()
    trainer.close()
    gates, _biases = _state(trainer.model_parts)
    return {layer: float(gate.double().square().sum()) for layer, gate in gates.items()}
