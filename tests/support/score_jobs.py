"""Metrics of scores under a layout, beside the tokens that its routers saw."""

from __future__ import annotations

from typing import Any

import torch
from torchtitan.config.override import derive
from torchtitan.models.common.config_utils import make_router_config

from tests.parity.gradients import (
    LoaderWithMask,
    Padding,
    build_from_seed,
    global_batch,
    run_batch,
)
from tests.parity.layout import Layout
from tests.support.score_metrics import Recorded, joined
from titan_moe_lb.balancing.recording.training_loop import TrainingLoop
from titan_moe_lb.balancing.router import LoadBalancedRouter, moe_layers_of
from titan_moe_lb.balancing.step_hook import wire
from titan_moe_lb.parallel.local_shard import local_shard
from titan_moe_lb.parallel.rank_groups import RankGroups
from titan_moe_lb.telemetry.reduction import reduce_step
from titan_moe_lb.upstream.torch_internals import in_backward


def watch(router: LoadBalancedRouter) -> list[Recorded]:
    """Record the valid tokens of each first forward of a router, by hooks."""
    seen: list[Recorded] = []
    logits: list[torch.Tensor] = []

    def of_gate(_gate: Any, _args: Any, output: torch.Tensor) -> None:
        logits.append(output)

    def of_router(_router: Any, args: tuple[torch.Tensor, ...], output: Any) -> None:
        logits_BLE = logits.pop()
        if in_backward() or not router.training:
            return
        x_BLD, bias_E = (*args, None)[:2]
        valid_BL = torch.ones(local_shard(x_BLD).shape[:2], dtype=torch.bool)
        if router.tokens is not None:
            valid_BL = router.tokens.valid_BL.bool().cpu()
        tables = [
            local_shard(table).detach().cpu()[valid_BL].float().numpy()
            for table in (x_BLD, logits_BLE)
        ]
        ids_TK = local_shard(output[1]).cpu()[valid_BL].numpy()
        bias = None if bias_E is None else local_shard(bias_E).detach().cpu().numpy().copy()
        seen.append(Recorded(*tables, ids_TK, bias))

    router.gate.register_forward_hook(of_gate)
    router.register_forward_hook(of_router)
    return seen


def scores_of_layout(
    seed_folder: str,
    out_folder: str,
    layout: Layout,
    *,
    module: str,
    config: str,
    model: dict[str, Any],
    padding: Padding = "none",
) -> tuple[dict[int, dict[str, float]], dict[int, Recorded]]:
    """Train two steps of a fixed batch.

    Returns:
        Metrics of every layer in the second step, and the tokens of this rank's layers in it; no
        tokens of a compiled model.
    """

    def adapt(trainer_config: Any) -> None:
        trainer_config.metrics.router_scores, trainer_config.metrics.log_freq = True, 1
        if padding == "masked":
            loader = trainer_config.dataloader
            trainer_config.dataloader = derive(loader, LoaderWithMask.Config)

    trainer = build_from_seed(seed_folder, out_folder, layout, module, config, model, adapt)
    layers = moe_layers_of(trainer.model_parts)
    seen: dict[int, list[Recorded]] = {}
    for number in range(2):
        batch = global_batch(layout.sequence_length, 7 + number)
        if number and not layout.compile:
            seen = {layer.router.layer: watch(layer.router) for layer in layers}
        run_batch(trainer, layout, batch, with_main_loss=True, padding=padding)
        trainer.optimizers.step()
    load = reduce_step(layers, RankGroups.of(trainer.parallel_dims))
    metrics = {
        layer: {name: float(values_M[row]) for name, values_M in load.layer_columns.items()}
        for row, layer in enumerate(load.layers)
    }
    trainer.close()
    return metrics, {layer: joined(parts) for layer, parts in seen.items() if parts}


def wide_router(
    score_func: str,
    num_experts: int,
    top_k: int,
    weight: torch.Tensor,
    groups: tuple[int, int] | None = None,
) -> LoadBalancedRouter:
    """Build a wired router with a given weight that records its scores, alone in its process."""
    gate = make_router_config(
        dim=weight.shape[1],
        num_experts=num_experts,
        gate_param_init={},
        top_k=top_k,
        score_func=score_func,
        num_expert_groups=groups and groups[0],
        num_limited_groups=groups and groups[1],
    )
    loop = TrainingLoop(scores_every=1)
    built = derive(gate, LoadBalancedRouter.Config, loop=loop).build().to(weight.dtype)
    with torch.no_grad():
        built.gate.weight.copy_(weight)
    wire([built], RankGroups())
    return built
