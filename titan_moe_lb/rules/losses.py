"""Aux losses. See :mod:`titan_moe_lb.rules`."""

from __future__ import annotations

from torchtitan.trainer import Trainer

from titan_moe_lb import toml_tables
from titan_moe_lb.errors import JobError
from titan_moe_lb.losses import AuxLoss, BatchWiseAuxLoss, GlobalBatchAuxLoss
from titan_moe_lb.parallel import batch_cut
from titan_moe_lb.router import LoadBalancedRouter


def batch_wise_sees_the_whole_batch(config: Trainer.Config) -> None:
    for _fqn, router, _parent, _attribute in config.traverse(LoadBalancedRouter.Config):
        losses = router.aux_losses
        if any(isinstance(loss, BatchWiseAuxLoss.Config) for loss in losses):
            break
    else:
        return
    reason = (
        "because per-micro-batch token-to-expert counts do not reflect the full batch; put this "
        "line under [model] to count the whole batch (over the previous step): "
        f"{_with_global_batch(losses)}"
    )
    if config.parallelism.pipeline_parallel_degree > 1:
        raise JobError(f"batch-wise aux loss is incompatible with pipeline parallelism {reason}")
    if batch_cut.cut(config).accumulation_steps > 1:
        raise JobError(
            "batch-wise aux loss is incompatible with gradient accumulation "
            f"(training.global_batch_size {config.training.global_batch_size}) {reason}"
        )


def running_counts_survive_recomputation(config: Trainer.Config) -> None:
    """A recomputed micro-batch would see the counts of the micro-batches after it."""
    running = any(
        loss.counts == "running"
        for _fqn, loss, _parent, _attribute in config.traverse(GlobalBatchAuxLoss.Config)
    )
    several = (
        config.parallelism.pipeline_parallel_degree > 1
        or batch_cut.cut(config).accumulation_steps > 1
    )
    if running and several and config.activation_checkpoint is not None:
        raise JobError(
            'global-batch aux loss with counts = "running" is incompatible with activation '
            "checkpointing under pipeline parallelism or gradient accumulation, because a "
            "recomputed micro-batch would see other counts than its forward did: set "
            'counts = "previous_step" or [activation_checkpoint] type = "none"'
        )


def one_loss_of_each_kind(config: Trainer.Config) -> None:
    for fqn, router, _parent, _attribute in config.traverse(LoadBalancedRouter.Config):
        kinds = [type(loss) for loss in router.aux_losses]
        for kind in kinds:
            if kinds.count(kind) > 1:
                raise JobError(
                    f"{fqn} has two losses of type {kind.__qualname__.removesuffix('.Config')}: "
                    "their weights would add up; keep one"
                )


def _with_global_batch(losses: list[AuxLoss.Config]) -> str:
    """The line of TOML with the same losses, the batch-wise one over the global batch."""
    whole_batch = [
        GlobalBatchAuxLoss.Config(weight=loss.weight, count_from=loss.count_from)
        if isinstance(loss, BatchWiseAuxLoss.Config)
        else loss
        for loss in losses
    ]
    return f"aux_losses = {toml_tables.inline(whole_batch)}"


RULES = (
    batch_wise_sees_the_whole_batch,
    running_counts_survive_recomputation,
    one_loss_of_each_kind,
)
