"""Every rejection of a job, at config time, one function per rule.

Each rule takes a ``Trainer.Config`` and raises ``JobError`` with one line that
names the setting and what to use instead. The launcher runs them before it
starts a process, and the model config once more when torchtitan binds it.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable

import torch
import torch._dynamo
from torchtitan.distributed.activation_checkpoint import SelectiveAC
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.common.moe import MoE
from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts
from torchtitan.trainer import Trainer

from titan_moe_lb import layout, toml_tables
from titan_moe_lb.errors import JobError
from titan_moe_lb.losses import AuxLoss, BatchWiseAuxLoss, GlobalBatchAuxLoss
from titan_moe_lb.router import LoadBalancedRouter
from titan_moe_lb.toml_tables import nearest

ZERO_BUBBLE_SCHEDULES = ("ZBVZeroBubble", "InterleavedZeroBubble", "DualPipeV")
"""Schedules that run the backward of a stage in two passes."""

SCHEDULES = ("1F1B", "GPipe", "Interleaved1F1B", "LoopedBFS", *ZERO_BUBBLE_SCHEDULES)
"""Schedules of torch.distributed.pipelining that can be named in a job."""

_AT_LEAST_ONE = (
    "training.local_batch_size",
    "training.seq_len",
    "training.steps",
    "parallelism.pipeline_parallel_microbatch_size",
    "metrics.log_freq",
    "checkpoint.interval",
)


def sizes_are_positive(config: Trainer.Config) -> None:
    for path in _AT_LEAST_ONE:
        section, name = path.split(".")
        value = getattr(getattr(config, section), name)
        if value < 1:
            raise JobError(f"{path} is {value}; it must be at least 1")
    total = config.training.global_batch_size
    if total != -1 and total < 1:
        raise JobError(
            f"training.global_batch_size is {total}; it must be at least 1, or -1 for "
            "local_batch_size x the data-parallel degree"
        )
    if not config.training.max_norm > 0:
        raise JobError(f"training.max_norm is {config.training.max_norm}; it must be above 0")


def optimizer_arguments_fit(config: Trainer.Config) -> None:
    for index, group in enumerate(config.optimizer.param_groups):
        optimizer = getattr(torch.optim, group.optimizer_name, None)
        if optimizer is not None:  # torchtitan has optimizers of its own besides torch's
            valid = inspect.signature(optimizer).parameters
            for name in group.optimizer_kwargs:
                if name not in valid:
                    raise JobError(
                        f"optimizer.param_groups[{index}].optimizer_kwargs: "
                        f"{group.optimizer_name} has no argument {name!r}; {nearest(name, valid)}"
                    )
        rate = group.optimizer_kwargs.get("lr")
        number = isinstance(rate, (int, float)) and not isinstance(rate, bool)
        if rate is not None and not (number and math.isfinite(rate) and rate >= 0):
            raise JobError(
                f"optimizer.param_groups[{index}].optimizer_kwargs.lr is {rate!r}; "
                "it must be a finite number of at least 0"
            )


def layout_fits_processes(config: Trainer.Config) -> None:
    layout.resolve(config.parallelism)


def local_batch_divides_into_microbatches(config: Trainer.Config) -> None:
    local = config.training.local_batch_size
    micro = config.parallelism.pipeline_parallel_microbatch_size
    if config.parallelism.pipeline_parallel_degree > 1 and local % micro:
        raise JobError(
            f"training.local_batch_size {local} is not divisible by "
            f"parallelism.pipeline_parallel_microbatch_size {micro}"
        )


def global_batch_divides_over_ranks(config: Trainer.Config) -> None:
    total = config.training.global_batch_size
    if total < 0:
        return
    dims = layout.resolve(config.parallelism)
    per_pass = config.training.local_batch_size * dims.dp_replicate * dims.dp_shard
    if total % per_pass:
        raise JobError(
            f"training.global_batch_size {total} is not a multiple of training.local_batch_size "
            f"x data-parallel degree = {config.training.local_batch_size} x "
            f"{dims.dp_replicate * dims.dp_shard}"
        )


def compile_backend_is_known(config: Trainer.Config) -> None:
    backends = torch._dynamo.list_backends(exclude_tags=())
    if config.compile.enable and config.compile.backend not in backends:
        raise JobError(
            f"compile.backend {config.compile.backend!r} does not exist; "
            f"{nearest(config.compile.backend, backends)}"
        )


def schedule_is_known(config: Trainer.Config) -> None:
    """torch ignores the case of the name; the rules here and in zero_bubble.py do not."""
    schedule = config.parallelism.pipeline_parallel_schedule
    if config.parallelism.pipeline_parallel_degree > 1 and schedule not in SCHEDULES:
        same = [name for name in SCHEDULES if name.lower() == schedule.lower()]
        raise JobError(
            f"parallelism.pipeline_parallel_schedule {schedule!r} does not exist; "
            f"{nearest(same[0] if same else schedule, SCHEDULES)}"
        )


def sequence_divides_over_ranks(config: Trainer.Config) -> None:
    tp, cp = (
        config.parallelism.tensor_parallel_degree,
        config.parallelism.context_parallel_degree,
    )
    divisor = (tp if config.parallelism.enable_sequence_parallel else 1) * (2 * cp if cp > 1 else 1)
    if config.training.seq_len % divisor:
        raise JobError(
            f"training.seq_len {config.training.seq_len} is not divisible by {divisor}, which "
            f"tensor_parallel_degree {tp} with sequence parallelism and "
            f"context_parallel_degree {cp} (two slices a rank) need"
        )


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


def _decoder(config: Trainer.Config) -> Decoder.Config | None:
    model = None if config.model_spec is None else config.model_spec.model
    return model if isinstance(model, Decoder.Config) else None


def zero_bubble_needs_whole_recompute(config: Trainer.Config) -> None:
    schedule = config.parallelism.pipeline_parallel_schedule
    if (
        config.parallelism.pipeline_parallel_degree > 1
        and schedule in ZERO_BUBBLE_SCHEDULES
        and isinstance(config.activation_checkpoint, SelectiveAC.Config)
    ):
        raise JobError(
            f"the {schedule} schedule runs each backward in two passes, which selective "
            'activation checkpointing does not survive: set [activation_checkpoint] type = "full" '
            'or type = "none"'
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
    if _accumulation_steps(config) > 1:
        raise JobError(
            "batch-wise aux loss is incompatible with gradient accumulation "
            f"(training.global_batch_size {config.training.global_batch_size}) {reason}"
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


def running_counts_survive_recomputation(config: Trainer.Config) -> None:
    """A recomputed micro-batch would see the counts of the micro-batches after it."""
    running = any(
        loss.counts == "running"
        for _fqn, loss, _parent, _attribute in config.traverse(GlobalBatchAuxLoss.Config)
    )
    several = config.parallelism.pipeline_parallel_degree > 1 or _accumulation_steps(config) > 1
    if running and several and config.activation_checkpoint is not None:
        raise JobError(
            'global-batch aux loss with counts = "running" is incompatible with activation '
            "checkpointing under pipeline parallelism or gradient accumulation, because a "
            "recomputed micro-batch would see other counts than its forward did: set "
            'counts = "previous_step" or [activation_checkpoint] type = "none"'
        )


def _accumulation_steps(config: Trainer.Config) -> int:
    total = config.training.global_batch_size
    if total < 0:
        return 1
    dims = layout.resolve(config.parallelism)
    return total // (config.training.local_batch_size * dims.dp_replicate * dims.dp_shard)


def one_loss_of_each_kind(config: Trainer.Config) -> None:
    for fqn, router, _parent, _attribute in config.traverse(LoadBalancedRouter.Config):
        kinds = [type(loss) for loss in router.aux_losses]
        for kind in kinds:
            if kinds.count(kind) > 1:
                raise JobError(
                    f"{fqn} has two losses of type {kind.__qualname__.removesuffix('.Config')}: "
                    "their weights would add up; keep one"
                )


def bias_update_speed_is_positive(config: Trainer.Config) -> None:
    for fqn, moe, _parent, _attribute in config.traverse(MoE.Config):
        speed = moe.load_balance_coeff
        if speed is not None and not (math.isfinite(speed) and speed > 0):
            raise JobError(
                f"{fqn}.load_balance_coeff is {speed}; it must be a finite number above 0, "
                "or none to turn the expert bias off"
            )


def assets_are_here(config: Trainer.Config) -> None:
    """Not among the rules: a job can be resolved and printed where it does not run."""
    if not os.path.isdir(config.hf_assets_path):
        raise JobError(
            f"hf_assets_path {config.hf_assets_path!r} is not a folder: download the model's "
            "tokenizer files there, or name a folder that holds a tokenizer.json"
        )


RULES: tuple[Callable[[Trainer.Config], None], ...] = (
    sizes_are_positive,
    optimizer_arguments_fit,
    layout_fits_processes,
    local_batch_divides_into_microbatches,
    global_batch_divides_over_ranks,
    compile_backend_is_known,
    schedule_is_known,
    sequence_divides_over_ranks,
    sequence_fits_model,
    heads_divide_over_ranks,
    expert_biases_are_added_once,
    tied_weights_stay_on_one_stage,
    zero_bubble_needs_whole_recompute,
    experts_divide_over_ranks,
    expert_groups_fit_router,
    batch_wise_sees_the_whole_batch,
    running_counts_survive_recomputation,
    one_loss_of_each_kind,
    bias_update_speed_is_positive,
)


def validate(config: Trainer.Config) -> None:
    """Run every rule. Raises ``JobError`` at the first that does not hold."""
    for rule in RULES:
        rule(config)
