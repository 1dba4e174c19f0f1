"""Rules of aux losses."""

from __future__ import annotations

from titan_moe_lb import toml_tables
from titan_moe_lb.balancing.losses import AuxLoss, BatchWiseAuxLoss, GlobalBatchAuxLoss, SumsLoss
from titan_moe_lb.balancing.router import LoadBalancedRouter, router_configs
from titan_moe_lb.errors import JobError
from titan_moe_lb.parallel.schedules import ZERO_BUBBLE_SCHEDULES
from titan_moe_lb.resolved_job import Job
from titan_moe_lb.telemetry.metrics_processor import LoadBalanceMetricsProcessor


def loss_sees_the_whole_batch(job: Job) -> None:
    """Refuse non-additive losses under pipeline parallelism and gradient accumulation."""
    for router in router_configs(job.config).values():
        if job.config.parallelism.pipeline_parallel_degree > 1:
            refuse_in_parts(router, "pipeline parallelism")
        if job.cut.accumulation_steps > 1:
            refuse_in_parts(
                router,
                "gradient accumulation "
                f"(training.global_batch_size {job.config.training.global_batch_size})",
            )


def refuse_in_parts(router: LoadBalancedRouter.Config, cut_by: str) -> None:
    """Refuse a loss that is not a sum over sequences, because the batch is cut into parts."""
    of_sums = [loss for loss in router.aux_losses if issubclass(loss._owner, SumsLoss)]
    whole = [loss for loss in of_sums if not loss._owner.additive]
    if not whole:
        return
    name = whole[0]._owner.type_name.replace("_", "-")
    reason = "because per-micro-batch token-to-expert counts do not reflect the full batch; "
    if isinstance(whole[0], BatchWiseAuxLoss.Config):
        reason += (
            "put this line under [model] to count the whole batch (over the previous step): "
            f"{_with_global_batch(router.aux_losses)}"
        )
    else:
        reason += "it is not a sum over sequences: train it without, or take another loss"
    raise JobError(f"{name} aux loss is incompatible with {cut_by} {reason}")


def gradients_can_be_measured(job: Job) -> None:
    """Check that the layout and the settings permit ``metrics.router_gradients``."""
    metrics = job.config.metrics
    if not isinstance(metrics, LoadBalanceMetricsProcessor.Config) or not metrics.router_gradients:
        return
    if metrics.router_gradients_every < 1:
        raise JobError(
            f"metrics.router_gradients_every is {metrics.router_gradients_every}: set it to n to "
            "measure every n-th logged step, 1 for each, or leave metrics.router_gradients out"
        )
    parallelism = job.config.parallelism
    if (
        parallelism.tensor_parallel_degree > 1
        and parallelism.expert_parallel_degree == 1
        and parallelism.spmd_backend == "spmd_types"
    ):
        raise JobError(
            "metrics.router_gradients: under tensor parallelism without expert parallelism a rank "
            "has a part of each gradient, whose norm is meaningless: measure in a layout without "
            "parallelism.tensor_parallel_degree, or with parallelism.expert_parallel_degree"
        )
    schedule = parallelism.pipeline_parallel_schedule
    if parallelism.pipeline_parallel_degree > 1 and schedule in ZERO_BUBBLE_SCHEDULES:
        raise JobError(
            f"metrics.router_gradients: {schedule} splits the backward and hands gradients to "
            "parameters alone: measure with parallelism.pipeline_parallel_schedule Interleaved1F1B"
        )


def _with_global_batch(losses: list[AuxLoss.Config]) -> str:
    """Return the line of TOML that replaces the batch-wise loss by the global-batch loss."""
    whole_batch = [
        GlobalBatchAuxLoss.Config(weight=loss.weight, count_from=loss.count_from)
        if isinstance(loss, BatchWiseAuxLoss.Config)
        else loss
        for loss in losses
    ]
    return f"aux_losses = {toml_tables.inline(whole_batch)}"


RULES = (
    loss_sees_the_whole_batch,
    gradients_can_be_measured,
)
