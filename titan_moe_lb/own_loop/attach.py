"""``attach()``: connect the balance of a model to a user's training loop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from titan_moe_lb.balancing.layer_checks import unbalanced_layers_of
from titan_moe_lb.balancing.recording.step_record import RouterRecord
from titan_moe_lb.balancing.recording.training_loop import TrainingLoop
from titan_moe_lb.balancing.router import LoadBalancedRouter, moe_layers_of, routers_of
from titan_moe_lb.balancing.step_hook import wire_parts
from titan_moe_lb.errors import JobError
from titan_moe_lb.own_loop.balance import Balance, require_at_least
from titan_moe_lb.parallel.layer_numbers import layer_name
from titan_moe_lb.parallel.rank_groups import RankGroups
from titan_moe_lb.rules.losses import refuse_in_parts
from titan_moe_lb.rules.routers import check_alike, check_router
from titan_moe_lb.upstream import cpu
from titan_moe_lb.upstream.torch_internals import ignore_buffers


def attach(
    model: nn.Module | Sequence[nn.Module],
    optimizer: Any = None,
    parallel_dims: Any = None,
    *,
    rows_per_step: int | None = None,
    padded: bool = False,
    gradients: Literal["sum", "mean"] = "sum",
    max_micro_batches: int = 64,
    router_scores: bool = False,
    router_gradients_every: int = 0,
    context_parallel_load_balancer: str | None = None,
    finished_steps: int = 0,
    seen_tokens: int = 0,
) -> Balance:
    """Connect the balance of a model to a training loop, once, before the model's first forward.

    Forwards in training mode and with gradients are counted. Forwards in ``eval()`` or under
    ``torch.no_grad()``, such as those of a reference model, are not. An aux loss reaches the
    routers in the backward of a counted forward; nothing is added to the loop's own loss.

    Args:
        model: a model of a spec that :func:`titan_moe_lb.balanced` returned, or this rank's parts
            of it.
        optimizer: a torch optimizer or torchtitan's container; its ``step()`` first closes a step
            of the balance. In a sequence of optimizers, the first one does. None: the loop calls
            :meth:`Balance.close_step`.
        parallel_dims: torchtitan's ``ParallelDims``. None: every process of the job has the whole
            model and different rows.
        rows_per_step: rows of the global batch over all ranks, if every step has the same number.
            None: the loop calls :meth:`Balance.begin_step`, which only aux losses need.
        padded: True if batches have padding. Forwards then receive the valid tokens:
            ``model(tokens, valid_tokens=mask)``, a bool mask of whole rows.
        gradients: how the loop combines the gradients of data-parallel ranks. torchtitan sums;
            torch's DistributedDataParallel and FSDP take the mean by default.
        max_micro_batches: largest number of forwards in a step; the record has a row for each.
        router_scores: True to record how sure each router is, for the metrics.
        router_gradients_every: steps from one measurement of the gradients of the model's loss and
            of the aux losses at each router to the next, for the metrics; 0 for none.
        context_parallel_load_balancer: torchtitan's name of how context parallelism splits a row.
        finished_steps: optimizer steps of the checkpoint that the loop continues from.
        seen_tokens: :attr:`Balance.seen_tokens` at that checkpoint. Only needed if a loss or a bias
            rule changes after a number of tokens.

    Raises:
        JobError: an argument is invalid; a layer of the model has no balanced router, or one that a
            job would be refused for; the model has a loop already.
    """
    if gradients not in ("sum", "mean"):
        raise JobError(f'attach(gradients={gradients!r}): it must be "sum" or "mean"')
    if rows_per_step is not None:
        require_at_least(1, "attach(rows_per_step)", rows_per_step)
    require_at_least(1, "attach(max_micro_batches)", max_micro_batches)
    require_at_least(0, "attach(router_gradients_every)", router_gradients_every)
    require_at_least(0, "attach(finished_steps)", finished_steps)
    require_at_least(0, "attach(seen_tokens)", seen_tokens)
    before_step = None if optimizer is None else _before_step_of(optimizer)

    cpu.prepare()
    parts = [model] if isinstance(model, nn.Module) else list(model)
    groups = RankGroups.each_alone() if parallel_dims is None else RankGroups.of(parallel_dims)
    _check_model(parts, groups)

    loop = TrainingLoop(
        num_micro_batches=max_micro_batches,
        varying=True,
        scores_every=int(router_scores),
        gradients_every=router_gradients_every,
        announced_rows=rows_per_step,
        padded=padded,
        context_parallel_load_balancer=context_parallel_load_balancer,
        gradient_divisor=groups.loss.size if gradients == "mean" else 1,
        finished_steps=finished_steps,
        seen_tokens=seen_tokens,
    )
    for router in routers_of(parts):
        if router.config.is_anticipatory:
            raise JobError(
                "balanced(routing=...) needs the Trainer of titan-moe-lb train, which reads batches "
                "ahead: leave routing out"
            )
        router.config.loop = loop
        for loss in router.aux_losses.values():
            loss.config.local_batch_size = None  # Of a job that the config was bound to.
    balance = Balance(parts, wire_parts(parts, groups), groups, finished_steps)
    for part in parts:
        ignore_buffers(part, _record_buffers(part))
    if before_step is not None:
        before_step(lambda *args, **kwargs: balance.close_step())
    return balance


def _before_step_of(optimizer: Any) -> Any:
    """Find the method of the (first) optimizer that registers a hook before ``step()``."""
    first = next(iter(optimizer), None) if isinstance(optimizer, Sequence) else optimizer
    register = getattr(first, "register_step_pre_hook", None)  # torchtitan's container has it too
    if register is None:
        raise JobError(
            f"attach(optimizer) is a {type(optimizer).__name__}: pass a torch.optim.Optimizer "
            "or a sequence of them, or none and call close_step() before each of their steps"
        )
    return register


def _check_model(parts: list[nn.Module], groups: RankGroups) -> None:
    """Raise ``JobError`` for a model with a loop, or without valid balanced routers."""
    routers = routers_of(parts)
    if any(router.record is not None for router in routers):
        raise JobError(
            "the model has its training loop already: attach() it once, and not to a model that "
            "torchtitan's Trainer trains; copy a model before attach()"
        )
    for name, layer in unbalanced_layers_of(parts):
        raise JobError(
            f"the router of {layer_name(name)} is a {type(layer.router).__name__}, whose loads "
            "are not balanced: build the model from the spec that titan_moe_lb.balanced(spec) returns"
        )
    for router in routers:
        for name, weight in router.gate.named_parameters():
            if not weight.is_floating_point() or weight.dtype.itemsize < 2:
                raise JobError(
                    f"the gate of layer {router.layer} is quantized: its {name} is {weight.dtype}; leave "
                    "gates out of the quantization, in bfloat16 or float32"
                )
    layers = Counter(layer.router for layer in moe_layers_of(parts))
    for router, sharing in layers.items():
        if sharing > 1:
            raise JobError(
                f"{sharing} MoE layers share the router of layer {router.layer}, which counts for one: "
                "give each layer a router of its own, or call one layer several times"
            )
    if not routers and groups.stages.size == 1:
        raise JobError(
            f"{type(parts[0]).__name__} has no MoE layer of torchtitan: a layer is balanced where "
            "it is a torchtitan.models.common.moe.MoE; for a router of another kind, "
            "titan_moe_lb.functional has the losses of plain tensors"
        )
    for name, router in [item for part in parts for item in part.named_modules()]:
        if isinstance(router, LoadBalancedRouter):
            check_router(layer_name(name), router.config)
            if groups.stages.size > 1:
                refuse_in_parts(router.config, "pipeline parallelism")
    check_alike([(f"layer {router.layer}", router.config) for router in routers])


def _record_buffers(part: nn.Module) -> list[str]:
    """List the names of the buffers in which a rank counts its own tokens."""
    return [
        f"{name}.{buffer}"
        for name, module in part.named_modules()
        if isinstance(module, RouterRecord)
        for buffer, _tensor in module.named_buffers()
    ]
