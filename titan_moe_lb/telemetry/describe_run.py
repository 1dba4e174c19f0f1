"""What a job says of itself in its traces."""

from __future__ import annotations

from datetime import UTC, datetime

import titan_moe_lb
from titan_moe_lb.parallel import batch_cut, layout
from titan_moe_lb.router import LoadBalancedRouter
from titan_moe_lb.traces.run_info import RunInfo


def describe_run(config) -> RunInfo:
    """Of a ``Trainer.Config`` whose MoE layers have load-balanced routers."""
    dims = layout.resolve(config.parallelism)
    cut = batch_cut.cut(config)
    routers = [
        router
        for _fqn, router, _parent, _attribute in config.model_spec.traverse(
            LoadBalancedRouter.Config
        )
    ]
    router = routers[0]
    bias, forced = router.expert_bias, router.forced_routing
    return RunInfo(
        model=config.model_spec.name,
        flavor=config.model_spec.flavor,
        num_experts=router.num_experts,
        top_k=router.top_k,
        layers=tuple(sorted(router.layer for router in routers)),
        losses={loss._owner.metric_name: loss.weight for loss in router.aux_losses},
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
        expert_bias=bias.describe() if bias is not None else None,
        started=datetime.now(UTC).astimezone().isoformat(timespec="seconds"),
        version=titan_moe_lb.__version__,
    )
