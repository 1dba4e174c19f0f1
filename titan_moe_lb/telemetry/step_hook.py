"""What happens to the records of a step when the optimizer steps."""

from __future__ import annotations

from torch import nn
from torchtitan.components.optimizer import (
    OptimizersContainer,
    register_moe_load_balancing_hook,
)
from torchtitan.distributed import ParallelDims

from titan_moe_lb.telemetry.recorder import finish_step
from titan_moe_lb.telemetry.reduction import routers_of


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
    recorders = [router.recorder for router in routers]
    optimizers.register_step_pre_hook(lambda *args, **kwargs: finish_step(recorders))
