"""What a job says of itself in its traces."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from titan_moe_lb.balancing.losses.base import AuxLoss
from titan_moe_lb.balancing.router import LoadBalancedRouter
from titan_moe_lb.checkpoints import placement
from titan_moe_lb.checkpoints.start import start_of
from titan_moe_lb.parallel import batch_cut, layout
from titan_moe_lb.telemetry.metric import Metric
from titan_moe_lb.traces.column import Column
from titan_moe_lb.traces.placement import coarse_to_fine
from titan_moe_lb.traces.run_info import RunInfo
from titan_moe_lb.traces.step_load import StepLoad
from titan_moe_lb.version import __version__

LEARNING = (
    Column("loss", per="step", description="Language-model loss, mean over the global batch."),
    Column("grad_norm", per="step", description="Norm of the gradient before it is clipped."),
    Column("tokens_per_second", per="step", description="Tokens per second and device."),
    Column("step_seconds", per="step", description="Seconds of a step since the last logged one."),
)


def describe_run(config) -> RunInfo:
    """Of a ``Trainer.Config`` whose MoE layers have load-balanced routers."""
    dims = layout.resolve(config.parallelism)
    cut = batch_cut.cut(config)
    routers = sorted(
        (router for _fqn, router, *_ in config.model_spec.traverse(LoadBalancedRouter.Config)),
        key=lambda router: router.layer,
    )
    router = routers[0]
    forced = router.forced_routing
    rules = dict.fromkeys(one.expert_bias.describe() for one in routers if one.expert_bias)
    losses = {loss._owner.metric_name: loss for loss in router.aux_losses}
    groups = {loss.expert_groups for loss in router.aux_losses}
    groups |= {one.num_expert_groups or 1 for one in routers}
    experts, top_k = ([getattr(one, name) for one in routers] for name in ("num_experts", "top_k"))
    return RunInfo(
        model=config.model_spec.name,
        flavor=config.model_spec.flavor,
        num_experts=max(experts),
        top_k=max(top_k),
        layers=tuple(one.layer for one in routers),
        num_experts_by_layer=tuple(experts) if len(set(experts)) > 1 else None,
        top_k_by_layer=tuple(top_k) if len(set(top_k)) > 1 else None,
        losses={name: loss.weight for name, loss in losses.items()},
        figures=(*columns_of(routers), *LEARNING),
        world_size=dims.world_size,
        pp=dims.pp,
        dp_replicate=dims.dp_replicate,
        dp_shard=dims.dp_shard,
        cp=dims.cp,
        tp=dims.tp,
        ep=dims.ep,
        schedule=config.parallelism.pipeline_parallel_schedule if dims.pp > 1 else None,
        local_batch_size=cut.local_batch_size,
        global_batch_size=cut.global_batch_size,
        micro_batch_size=cut.micro_batch_size,
        seq_len=cut.seq_len,
        forced_routing=forced.describe() if forced is not None else None,
        expert_bias="; ".join(rules) or None,
        score_func=router.score_func,
        expert_groups=coarse_to_fine(groups),
        placement=_placement(config),
        started=datetime.now(UTC).astimezone().isoformat(timespec="seconds"),
        version=__version__,
    )


def columns_of(routers: Sequence[LoadBalancedRouter.Config]) -> tuple[Column, ...]:
    """What is measured of the routers of a model: raw losses and metrics."""
    return (
        *(_of_loss(loss._owner) for loss in routers[0].aux_losses),
        *(kind.figure() for kind in Metric.kinds.values() if any(map(kind.applies_to, routers))),
    )


def columns_in(load: StepLoad) -> tuple[Column, ...]:
    """What was measured in a step: the same on every rank, whatever layers a rank has."""
    known = (
        *map(_of_loss, AuxLoss.kinds.values()),
        *(kind.figure() for kind in Metric.kinds.values()),
    )
    measured = {*load.figures, *load.step_columns}
    return tuple(column for column in known if column.name in measured)


def _of_loss(loss: type[AuxLoss]) -> Column:
    return Column(loss.metric_name, is_aux_loss=True, description=_first_line(loss.__doc__))


def _placement(config) -> str | None:
    """Title of the placement of the checkpoint that the job starts from."""
    start = start_of(config)
    found = placement.of_checkpoint(start.path) if start is not None else None
    return found.title if found is not None else None


def _first_line(text: str | None) -> str:
    return (text or "").partition("\n")[0]
