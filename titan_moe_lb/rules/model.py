"""What the model allows. See :mod:`titan_moe_lb.rules`."""

from __future__ import annotations

import math

from torchtitan.distributed.activation_checkpoint import MemoryBudgetAC
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.common.moe import MoE
from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts
from torchtitan.trainer import Trainer

from titan_moe_lb.errors import JobError
from titan_moe_lb.router import LoadBalancedRouter


def sequence_fits_model(config: Trainer.Config) -> None:
    model = _decoder(config)
    rope = None if model is None else getattr(model.first_attention, "rope", None)
    if rope is not None and config.training.seq_len > rope.max_seq_len:
        raise JobError(
            f"training.seq_len {config.training.seq_len} exceeds the {rope.max_seq_len} tokens "
            f"of the model's position encoding: set it to at most {rope.max_seq_len}"
        )


def heads_divide_over_ranks(config: Trainer.Config) -> None:
    degree = config.parallelism.tensor_parallel_degree
    model = _decoder(config)
    attention = None if model is None else model.first_attention
    if attention is None:
        return
    heads = {
        "attention heads": attention.n_heads,
        "key-value heads": getattr(attention, "n_kv_heads", None) or attention.n_heads,
    }
    for name, number in heads.items():
        if number % degree:
            raise JobError(
                f"parallelism.tensor_parallel_degree {degree} does not divide the model's "
                f"{number} {name}; it must be a divisor of {math.gcd(*heads.values())}"
            )


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


def tied_weights_stay_on_one_stage(config: Trainer.Config) -> None:
    model = _decoder(config)
    if (
        model is not None
        and model.enable_weight_tying
        and config.parallelism.pipeline_parallel_degree > 1
    ):
        raise JobError(
            "the model shares one weight between embedding and output, which lie on different "
            "pipeline stages: set parallelism.pipeline_parallel_degree to 1"
        )


def experts_divide_over_ranks(config: Trainer.Config) -> None:
    degree = config.parallelism.expert_parallel_degree
    for fqn, moe, _parent, _attribute in config.traverse(MoE.Config):
        if moe.num_experts % degree:
            raise JobError(
                f"parallelism.expert_parallel_degree {degree} does not divide the "
                f"{moe.num_experts} experts of {fqn}"
            )


def expert_groups_fit_router(config: Trainer.Config) -> None:
    for fqn, router, _parent, _attribute in config.traverse(LoadBalancedRouter.Config):
        if not 1 <= router.top_k <= router.num_experts:
            raise JobError(f"{fqn}.top_k {router.top_k} is outside [1, {router.num_experts}]")
        groups, limited = router.num_expert_groups, router.num_limited_groups
        if groups is None:
            continue
        if router.num_experts % groups or router.num_experts // groups < 2:
            raise JobError(
                f"{fqn}.num_expert_groups {groups} must divide the {router.num_experts} experts "
                "into groups of at least 2"
            )
        if limited is None or not 1 <= limited <= groups:
            raise JobError(f"{fqn}.num_limited_groups {limited} is outside [1, {groups}]")
        reachable = limited * (router.num_experts // groups)
        if router.top_k > reachable:
            raise JobError(
                f"{fqn}.top_k {router.top_k} exceeds the {reachable} experts of "
                f"{limited} of {groups} groups"
            )


def score_function_is_known(config: Trainer.Config) -> None:
    for fqn, router, _parent, _attribute in config.traverse(LoadBalancedRouter.Config):
        if router.score_func not in ("softmax", "sigmoid"):
            raise JobError(
                f"{fqn}.score_func is {router.score_func!r}; the router knows 'softmax' and "
                "'sigmoid'"
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


def _decoder(config: Trainer.Config) -> Decoder.Config | None:
    model = None if config.model_spec is None else config.model_spec.model
    return model if isinstance(model, Decoder.Config) else None


RULES = (
    sequence_fits_model,
    heads_divide_over_ranks,
    expert_biases_are_added_once,
    tied_weights_stay_on_one_stage,
    experts_divide_over_ranks,
    expert_groups_fit_router,
    score_function_is_known,
    checkpointing_keeps_decisions,
)
