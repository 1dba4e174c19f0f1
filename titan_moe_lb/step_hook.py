"""What happens to the records of a step when the optimizer steps."""

from __future__ import annotations

import torch
from torch import nn
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.distributed import ParallelDims
from torchtitan.models.common.moe import MoE
from torchtitan.tools.logging import logger

from titan_moe_lb.losses import GlobalBatchAuxLoss
from titan_moe_lb.parallel.local_shard import local_shard
from titan_moe_lb.recording import event_clock, recorder
from titan_moe_lb.router import LoadBalancedRouter, moe_layers_of, routers_of
from titan_moe_lb.telemetry.reduction import reduce_over_tokens


def register_load_balancing(
    optimizers: OptimizersContainer, model_parts: list[nn.Module], parallel_dims: ParallelDims
) -> None:
    """A ``ModelSpec.post_optimizer_build_fn``: the expert-bias update, and our records.

    Hands the routers their meshes, and closes the recorded step just before the
    optimizer steps, after the last micro-batch of the step has run. It stands in for
    torchtitan's own bias update, whose counts are doubled by activation checkpointing
    and miss the layers of multi-token prediction; both would reduce the same counts.
    """
    layers = moe_layers_of(model_parts)
    routers = routers_of(model_parts)
    for router in routers:
        router.wire_meshes(parallel_dims)
    event_clock.wire(router.clock for router in routers if router.clock is not None)
    _announce_forced_routing(routers)
    if not layers:
        return
    optimizers.register_step_pre_hook(lambda *args, **kwargs: _close_step(layers, parallel_dims))


def _close_step(layers: list[MoE], parallel_dims: ParallelDims) -> None:
    routers: list[LoadBalancedRouter] = [layer.router for layer in layers]  # type: ignore[misc]
    recorder.finish_step([router.recorder for router in routers if router.records])
    event_clock.finish_step([router.clock for router in routers if router.clock is not None])
    if any(router.needs_step_counts for router in routers):
        reduce_over_tokens(routers, parallel_dims)
    _move_expert_biases(layers)
    # Counted by torchtitan's MoE.forward, and read by nobody here.
    torch._foreach_zero_([local_shard(layer.tokens_per_expert_E) for layer in layers])
    for router in routers:
        for loss in router.aux_losses.values():
            if isinstance(loss, GlobalBatchAuxLoss):
                source = router.count_sources.index(loss.count_from)
                loss.finish_step(router.recorder.global_counts_SE[source])


def _move_expert_biases(layers: list[MoE]) -> None:
    moving = [
        layer
        for layer in layers
        if layer.router.expert_bias is not None and layer.router.expert_bias.moves  # type: ignore[union-attr]
    ]
    if not moving:
        return
    with torch.no_grad():
        biases = [local_shard(layer.expert_bias_E) for layer in moving]
        counts_NE = torch.stack([layer.router.recorder.global_counts_SE[0] for layer in moving])  # type: ignore[union-attr]
        delta_NE = moving[0].router.expert_bias.delta(torch.stack(biases), counts_NE)  # type: ignore[union-attr]
        torch._foreach_add_(biases, list(delta_NE.unbind()))


def _announce_forced_routing(routers: list[LoadBalancedRouter]) -> None:
    strategies = {
        router.forced_routing.config.describe()
        for router in routers
        if router.forced_routing is not None
    }
    for strategy in strategies:
        logger.warning(
            f"FORCED ROUTING: {strategy} decides where tokens go in {len(routers)} MoE layers. "
            "This run is a benchmark: its model is not worth keeping"
        )
