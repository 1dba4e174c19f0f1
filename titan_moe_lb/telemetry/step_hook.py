"""What happens to the records of a step when the optimizer steps."""

from __future__ import annotations

from torch import nn
from torchtitan.components.optimizer import (
    OptimizersContainer,
    register_moe_load_balancing_hook,
)
from torchtitan.distributed import ParallelDims

from titan_moe_lb.losses import GlobalBatchAuxLoss
from titan_moe_lb.router import LoadBalancedRouter
from titan_moe_lb.telemetry.recorder import finish_step
from titan_moe_lb.telemetry.reduction import reduce_over_tokens, routers_of


def register_load_balancing(
    optimizers: OptimizersContainer, model_parts: list[nn.Module], parallel_dims: ParallelDims
) -> None:
    """A ``ModelSpec.post_optimizer_build_fn``: torchtitan's expert-bias update, and our records.

    Hands the routers their meshes, and closes the recorded step just before the
    optimizer steps, after the last micro-batch of the step has run.
    """
    register_moe_load_balancing_hook(optimizers, model_parts, parallel_dims)
    routers = routers_of(model_parts)
    for router in routers:
        router.wire_meshes(parallel_dims)
    optimizers.register_step_pre_hook(lambda *args, **kwargs: _close_step(routers, parallel_dims))


def _close_step(routers: list[LoadBalancedRouter], parallel_dims: ParallelDims) -> None:
    recorders = [router.recorder for router in routers]
    finish_step(recorders)
    global_batch = [
        (router, loss)
        for router in routers
        for loss in router.aux_losses.values()
        if isinstance(loss, GlobalBatchAuxLoss)
    ]
    if any(loss.counts == "previous_step" for _router, loss in global_batch):
        reduce_over_tokens(recorders, parallel_dims)
    for router, loss in global_batch:
        source = router.count_sources.index(loss.count_from)
        loss.finish_step(router.recorder.step_counts_SE[source])
