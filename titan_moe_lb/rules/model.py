"""What the model allows. See :mod:`titan_moe_lb.rules`."""

from __future__ import annotations

from torchtitan.distributed.activation_checkpoint import MemoryBudgetAC
from torchtitan.models.common.moe import MoE
from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts
from torchtitan.trainer import Trainer

from titan_moe_lb.errors import JobError
from titan_moe_lb.router import LoadBalancedRouter
from titan_moe_lb.rules.places import place


def expert_biases_are_added_once(config: Trainer.Config) -> None:
    """Upstream fact: under tensor parallelism torchtitan 0.3.0 adds the output bias of GPT-OSS's
    experts on every rank (spmd_types without EP) and halves the gradient of the attention's
    output bias (partial_dtensor)."""
    parallelism = config.parallelism
    right = parallelism.expert_parallel_degree > 1 and parallelism.spmd_backend == "spmd_types"
    if parallelism.tensor_parallel_degree == 1 or right:
        return
    if any(config.traverse(GptOssGroupedExperts.Config)):
        raise JobError(
            "torchtitan 0.3.0 gets the biases of GPT-OSS wrong under this tensor parallelism: set "
            "parallelism.tensor_parallel_degree to 1, or expert_parallel_degree above 1 with "
            'spmd_backend = "spmd_types"'
        )


def experts_divide_over_ranks(config: Trainer.Config) -> None:
    degree = config.parallelism.expert_parallel_degree
    for fqn, moe, _parent, _attribute in config.traverse(MoE.Config):
        if moe.num_experts % degree:
            raise JobError(
                f"parallelism.expert_parallel_degree {degree} does not divide the "
                f"{moe.num_experts} experts of {place(fqn)}"
            )


def checkpointing_keeps_decisions(config: Trainer.Config) -> None:
    """What :mod:`titan_moe_lb.parallelization` does for the other kinds has no seam here."""
    if isinstance(config.activation_checkpoint, MemoryBudgetAC.Config) and any(
        config.traverse(LoadBalancedRouter.Config)
    ):
        raise JobError(
            '[activation_checkpoint] type = "memory-budget" lets the compiler choose the experts '
            "of a token again in the backward, and it may choose others than those that the loss "
            'has seen: set type = "selective" or "full"'
        )


RULES = (
    expert_biases_are_added_once,
    experts_divide_over_ranks,
    checkpointing_keeps_decisions,
)
