"""Columns of a job's trace besides the counts: aux losses, metrics, torchtitan's own numbers."""

from __future__ import annotations

from collections.abc import Sequence

from titan_moe_lb.balancing.component import first_paragraph
from titan_moe_lb.balancing.freezing import applied_losses
from titan_moe_lb.balancing.losses.base import AuxLoss
from titan_moe_lb.balancing.router import LoadBalancedRouter
from titan_moe_lb.telemetry.metrics import Metric
from titan_moe_lb.traces.columns import Column
from titan_moe_lb.traces.step_load import StepLoad

LEARNING = (
    Column("loss", per="step", description="Language-model loss, mean over the global batch."),
    Column("grad_norm", per="step", description="Norm of the gradient before it is clipped."),
    Column("tokens_per_second", per="step", description="Tokens per second and device."),
    Column("step_seconds", per="step", description="Seconds of a step since the last logged one."),
)
"""Columns of numbers that torchtitan logs itself."""


def columns_of(routers: Sequence[LoadBalancedRouter.Config]) -> tuple[Column, ...]:
    """Return the columns of the losses and metrics that the routers of a model have."""
    return (
        *(_of_loss(loss._owner) for loss in applied_losses(routers)),
        *(kind.column() for kind in Metric.kinds.values() if any(map(kind.applies_to, routers))),
    )


def columns_in(load: StepLoad) -> tuple[Column, ...]:
    """Return the columns of the losses and metrics in a load, equal on every rank."""
    known = (
        *map(_of_loss, AuxLoss.kinds.values()),
        *(kind.column() for kind in Metric.kinds.values()),
    )
    return tuple(one for one in known if one.name in load.layer_columns | load.step_columns)


def _of_loss(loss: type[AuxLoss]) -> Column:
    return Column(loss.metric_name, is_aux_loss=True, description=first_paragraph(loss))
