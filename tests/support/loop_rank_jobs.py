"""Loops whose ranks behave differently, on the ranks of a pool."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torchtitan.config import CommConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as dist_utils

from tests.support.loop_model import Loop, MoELayers, error_of
from titan_moe_lb.balancing.losses import AuxLoss, GlobalBatchAuxLoss, SequenceWiseAuxLoss
from titan_moe_lb.own_loop.attach import attach


def _rank() -> int:
    dist_utils.init_distributed(CommConfig())
    return dist.get_rank()


def forward_on_rank_0_alone() -> dict[str, Any]:
    """Run a step with a forward on rank 0 only, then one without any."""
    rank, loop = _rank(), Loop()
    if rank == 0:
        loop.forward_and_backward()
    metrics = []
    for _step in range(2):
        loop.optimizer.step()
        metrics.append(loop.balance.metrics())
    biases = {name: bias.tolist() for name, bias in loop.model.biases.items()}
    return {"metrics": metrics, "biases": biases, "moved": any(map(any, biases.values()))}


def step_on_rank_0_alone() -> str | None:
    rank, loop = _rank(), Loop(MoELayers(rule=None))
    for step in range(2):
        loop.forward_and_backward()
        if step == 0 or rank == 0:
            loop.optimizer.step()
    return error_of(loop.balance.metrics)


def copy_after_attach() -> bool:
    """Check a copy: it chooses as the model does, and its loss counts over the ranks."""
    _rank()
    loop = Loop(MoELayers([GlobalBatchAuxLoss.Config(weight=1.0, counts="running")]))
    x_BLD = torch.randn(2, 8, 64)
    with torch.no_grad():
        return torch.equal(copy.deepcopy(loop.model)(x_BLD), loop.model(x_BLD))


def attach_to_a_stage(loss: type[AuxLoss]) -> str | None:
    """Attach to a stage of a pipeline of 2, and run a forward before its step is announced."""
    _rank()
    dims = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=2, ep=1, world_size=2)
    model = MoELayers([loss.Config(weight=1.0)])

    def train() -> None:
        attach(model, None, dims)
        model(torch.randn(2, 8, 64)).sum().backward()

    return error_of(train)


def announce_other_rows() -> str | None:
    loss = SequenceWiseAuxLoss.Config(weight=1.0)
    rank, loop = _rank(), Loop(MoELayers([loss], rule=None))
    loop.balance.begin_step(4 + rank)
    loop.forward_and_backward()
    loop.optimizer.step()
    return error_of(loop.balance.metrics)


def distributed_data_parallel_after_attach() -> dict[str, Any]:
    """Run two micro-batches on each rank, each with other tokens."""
    rank = _rank()
    loss = SequenceWiseAuxLoss.Config(weight=1.0)
    loop = Loop(MoELayers([loss]), gradients="mean")
    model = DistributedDataParallel(loop.model)
    loop.balance.begin_step(8)
    inputs = torch.randn(2, 2, 2, 8, 64, generator=torch.Generator().manual_seed(7))[rank]
    for x_BLD in inputs:
        model(x_BLD).square().mean().backward()
    loop.optimizer.step()
    load = loop.balance.load()
    return {
        "own": [
            np.bincount(np.concatenate(ids).ravel(), minlength=8).tolist()
            for ids in loop.model.chosen.values()
        ],
        "own_loss": [
            sum(map(_of_row, np.concatenate(ids), np.concatenate(scores)))
            for ids, scores in zip(
                loop.model.chosen.values(), loop.model.scores.values(), strict=True
            )
        ],
        "counts": load.counts_ME.tolist(),
        "loss": load.layer_columns["seq_load_balancing_loss"],
    }


def _of_row(ids_LK: np.ndarray, scores_LE: np.ndarray) -> float:
    """Compute sum_i f_i P_i, DeepSeek-V3's Eqs. 17 to 20."""
    (length, top_k), num_experts = ids_LK.shape, scores_LE.shape[1]
    f_E = np.bincount(ids_LK.ravel(), minlength=num_experts) * num_experts / (top_k * length)
    P_E = (scores_LE / scores_LE.sum(axis=1, keepdims=True)).mean(axis=0)
    return float((f_E * P_E).sum())
