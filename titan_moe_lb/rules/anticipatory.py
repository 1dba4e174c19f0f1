"""Rules of anticipatory routing: what its forward ahead was not shown to be exact with."""

from __future__ import annotations

from titan_moe_lb.balancing.anticipatory_routing.trainer import runs_ahead
from titan_moe_lb.balancing.hash_router import is_hash_router
from titan_moe_lb.balancing.router import router_configs
from titan_moe_lb.errors import JobError
from titan_moe_lb.resolved_job import Job
from titan_moe_lb.upstream import cpu


def forward_ahead_is_exact(job: Job) -> None:
    """Refuse jobs that would train with other experts than those of ``delay`` steps ago."""
    config = job.config
    routing = getattr(config.model_spec, "routing", None)
    if routing is None:
        return
    parallelism, checkpoint = config.parallelism, config.checkpoint
    policy = config.activation_checkpoint
    routers = [*router_configs(config).values()]
    saves = checkpoint.enable and not (checkpoint.load_only or checkpoint.create_seed_checkpoint)
    refused = {
        "it runs in the Trainer of a job file: start it by titan-moe-lb train or "
        "titan_moe_lb.run.train.trainer_config()": not runs_ahead(config),
        "debug.moe_force_load_balance chooses the experts: leave one of them out": (
            config.debug.moe_force_load_balance
        ),
        "[model] forced_routing chooses the experts: leave one of them out": any(
            router.forced_routing for router in routers
        ),
        "padded batches and losses over documents were not tried with it": any(
            loss.documents is not None for router in routers for loss in router.aux_losses
        )
        or getattr(config.dataloader._owner, "gives_valid_tokens", False),
        "a layer routes by token id: its experts do not depend on parameters": any(
            map(is_hash_router, routers)
        ),
        "a checkpoint does not hold the experts in flight, so that a resumed run would differ: set "
        "checkpoint.enable = false, or checkpoint.load_only = true to start from weights": saves,
        "parallelism.pipeline_parallel_degree must be 1: the forward ahead does not go through a "
        "pipeline's schedule": parallelism.pipeline_parallel_degree > 1,
        'parallelism.spmd_backend must be "spmd_types": the others were not tried': (
            parallelism.spmd_backend != "spmd_types"
        ),
        "compile.enable must be false for the model: a compiled block was not tried": (
            config.compile.enable and "model" in config.compile.components
        ),
        "activation_checkpoint must be full, selective or none: others were not tried": (
            type(policy)._owner.__name__ not in ("FullAC", "SelectiveAC") if policy else False
        ),
        "training.disable_cuda_graphs must be true: a graph would repeat its first experts": not (
            config.training.disable_cuda_graphs or cpu.needed()
        ),
    }
    for reason, holds in refused.items():
        if holds:
            raise JobError(f"[model] routing anticipatory: {reason}")
    if routing.delay >= config.training.steps:
        raise JobError(
            f"[model] routing delay is {routing.delay}, and training.steps is "
            f"{config.training.steps}: all steps would use the experts of the first parameters; "
            "set a smaller delay"
        )


RULES = (forward_ahead_is_exact,)
