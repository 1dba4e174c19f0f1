"""Description of a job for its traces: model, layout, batch, losses and bias rules."""

from __future__ import annotations

from datetime import UTC, datetime

from titan_moe_lb.balancing.freezing import applied_losses, layers_by_part
from titan_moe_lb.balancing.router import router_configs
from titan_moe_lb.checkpoints import placement_file
from titan_moe_lb.resolved_job import Job
from titan_moe_lb.telemetry.trace_columns import LEARNING, columns_of
from titan_moe_lb.traces.expert_order import coarse_to_fine
from titan_moe_lb.traces.run_info import RunInfo
from titan_moe_lb.version import __version__


def describe_run(job: Job) -> RunInfo:
    """Describe a job whose MoE layers have load-balanced routers."""
    config, layout, cut = job.config, job.layout, job.cut
    routers = sorted(router_configs(config.model_spec).values(), key=lambda router: router.layer)
    router = routers[0]
    forced, routing = router.forced_routing, getattr(config.model_spec, "routing", None)
    rules = dict.fromkeys(one.expert_bias.describe() for one in routers if one.expert_bias)
    losses = {loss._owner.metric_name: loss for loss in applied_losses(routers)}
    groups = {loss.expert_groups for loss in router.aux_losses}
    groups |= {one.num_expert_groups or 1 for one in routers}
    experts, top_k = ([getattr(one, name) for one in routers] for name in ("num_experts", "top_k"))
    placement = placement_file.of_checkpoint(job.start.path) if job.start is not None else None
    return RunInfo(
        model=config.model_spec.name,
        flavor=config.model_spec.flavor,
        num_experts=max(experts),
        top_k=max(top_k),
        layers=tuple(one.layer for one in routers),
        num_experts_by_layer=tuple(experts) if len(set(experts)) > 1 else None,
        top_k_by_layer=tuple(top_k) if len(set(top_k)) > 1 else None,
        losses={name: loss.weight for name, loss in losses.items()},
        columns=(*columns_of(routers), *LEARNING),
        world_size=layout.world_size,
        pp=layout.pp,
        dp_replicate=layout.dp_replicate,
        dp_shard=layout.dp_shard,
        cp=layout.cp,
        tp=layout.tp,
        ep=layout.ep,
        schedule=config.parallelism.pipeline_parallel_schedule if layout.pp > 1 else None,
        local_batch_size=cut.local_batch_size,
        global_batch_size=cut.global_batch_size,
        micro_batch_size=cut.micro_batch_size,
        seq_len=cut.seq_len,
        forced_routing=forced.describe() if forced is not None else None,
        routing=None if routing is None else routing.describe(),
        expert_bias="; ".join(rules) or None,
        frozen=layers_by_part(routers),
        score_func=router.score_func,
        expert_groups=coarse_to_fine(groups),
        placement=None if placement is None else placement.title,
        started=datetime.now(UTC).astimezone().isoformat(timespec="seconds"),
        version=__version__,
        learning_rate=config.optimizer.param_groups[0].optimizer_kwargs.get("lr"),
        seed=config.debug.seed,
    )
