"""Rules of a job's model."""

from __future__ import annotations

from typing import Any

from torchtitan.distributed.activation_checkpoint import MemoryBudgetAC, SelectiveAC
from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts

from titan_moe_lb.balancing.router import router_configs
from titan_moe_lb.errors import JobError
from titan_moe_lb.parallel.layer_numbers import layer_name, moe_layers
from titan_moe_lb.parallel.schedules import ZERO_BUBBLE_SCHEDULES
from titan_moe_lb.resolved_job import Job


def expert_biases_are_added_once(job: Job) -> None:
    """Refuse layouts in which torchtitan 0.3.0 computes the biases of GPT-OSS wrong.

    Upstream fact: under tensor parallelism, ``spmd_types`` without EP adds the output bias of the
    experts on every rank. ``partial_dtensor`` halves the gradient of the attention's output bias.
    """
    parallelism = job.config.parallelism
    right = parallelism.expert_parallel_degree > 1 and parallelism.spmd_backend == "spmd_types"
    if parallelism.tensor_parallel_degree == 1 or right:
        return
    if any(job.config.traverse(GptOssGroupedExperts.Config)):
        raise JobError(
            "torchtitan 0.3.0 gets the biases of GPT-OSS wrong under this tensor parallelism: set "
            "parallelism.tensor_parallel_degree to 1, or expert_parallel_degree above 1 with "
            'spmd_backend = "spmd_types"'
        )


def experts_divide_over_ranks(job: Job) -> None:
    """Check that the expert-parallel degree divides the experts of each layer."""
    degree = job.config.parallelism.expert_parallel_degree
    for fqn, moe in moe_layers(job.config).items():
        if moe.num_experts % degree:
            raise JobError(
                f"parallelism.expert_parallel_degree {degree} does not divide the "
                f"{moe.num_experts} experts of {layer_name(fqn)}"
            )


def layers_count_their_experts_alike(config: Any) -> None:
    """Check that num_experts and top_k are the same in all parts of a layer.

    torchtitan does not compare them. A dispatcher with another top_k sends tokens to the wrong
    experts.
    """
    for fqn, moe in moe_layers(config).items():
        router, routed = moe.router, moe.routed_experts
        dispatcher = routed.token_dispatcher
        for numbers in (
            {
                "num_experts": moe.num_experts,
                "router.num_experts": router.num_experts,
                "router.gate.out_features": router.gate.out_features,
                "routed_experts.inner_experts.num_experts": routed.inner_experts.num_experts,
                "routed_experts.token_dispatcher.num_experts": dispatcher.num_experts,
            },
            {
                "router.top_k": router.top_k,
                "routed_experts.token_dispatcher.top_k": dispatcher.top_k,
            },
        ):
            if len(set(numbers.values())) > 1:
                found = ", ".join(f"{name} {number}" for name, number in numbers.items())
                raise JobError(f"{layer_name(fqn)} has {found}: set all of them to one number")


def checkpointing_keeps_decisions(job: Job) -> None:
    """Refuse memory-budget checkpointing of balanced routers.

    :mod:`titan_moe_lb.balancing.checkpointing` saves routing decisions for the other kinds only.
    """
    kind = job.config.activation_checkpoint
    if isinstance(kind, MemoryBudgetAC.Config) and router_configs(job.config):
        raise JobError(
            '[activation_checkpoint] type = "memory-budget" lets the compiler choose the experts '
            "of a token again in the backward, and it may choose others than those that the loss "
            'has seen: set type = "selective" or "full"'
        )


def zero_bubble_needs_whole_recompute(job: Job) -> None:
    """Refuse selective activation checkpointing under a zero-bubble schedule."""
    schedule = job.config.parallelism.pipeline_parallel_schedule
    if (
        job.config.parallelism.pipeline_parallel_degree > 1
        and schedule in ZERO_BUBBLE_SCHEDULES
        and isinstance(job.config.activation_checkpoint, SelectiveAC.Config)
    ):
        raise JobError(
            f"the {schedule} schedule runs each backward in two passes, which selective "
            'activation checkpointing does not support: set [activation_checkpoint] type = "full" '
            'or type = "none"'
        )


RULES = (
    expert_biases_are_added_once,
    lambda job: layers_count_their_experts_alike(job.config),
    experts_divide_over_ranks,
    checkpointing_keeps_decisions,
    zero_bubble_needs_whole_recompute,
)
