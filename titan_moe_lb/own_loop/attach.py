"""Balance in a training loop of one's own."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torchtitan.distributed import ParallelDims
from torchtitan.models.common.moe import MoE
from torchtitan.tools import utils

from titan_moe_lb.balancing.recording.step_record import RouterRecord
from titan_moe_lb.balancing.recording.training_loop import TrainingLoop
from titan_moe_lb.balancing.router import LoadBalancedRouter, moe_layers_of, routers_of
from titan_moe_lb.balancing.step_hook import StepHook, wire_parts
from titan_moe_lb.balancing.tensor_checks import not_finite
from titan_moe_lb.errors import JobError
from titan_moe_lb.parallel.rank_groups import RankGroups
from titan_moe_lb.rules.layer_names import layer_name
from titan_moe_lb.rules.losses import refuse_in_parts
from titan_moe_lb.rules.routers import check_alike, check_router
from titan_moe_lb.telemetry.columns import columns_in
from titan_moe_lb.telemetry.reduction import reduce_step
from titan_moe_lb.telemetry.sink_metrics import sink_metrics
from titan_moe_lb.traces.step_load import StepLoad
from titan_moe_lb.upstream import cpu


def attach(
    model: nn.Module | Sequence[nn.Module],
    optimizer: Any = None,
    parallel_dims: ParallelDims | None = None,
    *,
    rows_per_step: int | None = None,
    padded: bool = False,
    gradients: Literal["sum", "mean"] = "sum",
    max_micro_batches: int = 64,
    context_parallel_load_balancer: str | None = None,
    finished_steps: int = 0,
    seen_tokens: int = 0,
) -> Balance:
    """Give the balance of a model to a training loop. Once, before its first forward.

    What counts is every forward in training mode and with gradients; those of an evaluation,
    of a reference model or of log-probabilities under ``torch.no_grad()`` leave no trace. An
    aux loss reaches the routers by the backward of such a forward: nothing is added to the
    loop's own loss.

    Args:
        model: of a spec that :func:`titan_moe_lb.balanced` returned; or this rank's parts of it.
        optimizer: a torch optimizer or torchtitan's container; its ``step()`` closes a step of the
            balance just before. A sequence of several: the first of them does. None: the loop calls
            :meth:`Balance.close_step`.
        parallel_dims: torchtitan's. None: every process of the job holds the whole model and
            other rows.
        rows_per_step: rows of the global batch over all ranks, where each step has as many;
            None where :meth:`Balance.begin_step` says it. Without an aux loss nobody asks.
        padded: batches come with padding, and forwards say which tokens are valid:
            ``model(tokens, valid_tokens=mask)``, a bool mask of whole rows.
        gradients: how the loop puts the gradients of the data-parallel ranks together. torchtitan
            sums; torch's DistributedDataParallel and FSDP take the mean unless told otherwise.
        max_micro_batches: the most forwards of a step; the record has a row for each.
        context_parallel_load_balancer: how context parallelism deals the tokens of a row.
        finished_steps: of the checkpoint that the loop goes on from.
        seen_tokens: the same: :attr:`Balance.seen_tokens` when it was saved. Where a loss or the
            rule of the bias changes after a number of tokens, nobody asks otherwise.

    Raises:
        JobError: a layer of the model has no balanced router, or one that a job would be refused
            for; the model has a loop already; an argument that cannot be.
    """
    if gradients not in ("sum", "mean"):
        raise JobError(f'attach(gradients={gradients!r}): it must be "sum" or "mean"')
    if rows_per_step is not None:
        _require_at_least(1, "attach(rows_per_step)", rows_per_step)
    _require_at_least(1, "attach(max_micro_batches)", max_micro_batches)
    _require_at_least(0, "attach(finished_steps)", finished_steps)
    _require_at_least(0, "attach(seen_tokens)", seen_tokens)
    optimizers = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
    if optimizer is not None and not hasattr(next(iter(optimizers), None), _BEFORE_STEP):
        raise JobError(
            f"attach(optimizer) is a {type(optimizer).__name__}: give it a torch.optim.Optimizer "
            "or a sequence of them, or none and call close_step() before each of their steps"
        )
    cpu.prepare()
    parts = [model] if isinstance(model, nn.Module) else list(model)
    groups = RankGroups.each_alone() if parallel_dims is None else RankGroups.of(parallel_dims)
    routers = routers_of(parts)
    _check(parts, routers, groups)
    loop = TrainingLoop(
        num_micro_batches=max_micro_batches,
        varying=True,
        global_batch_size=rows_per_step,
        padded=padded,
        context_parallel_load_balancer=context_parallel_load_balancer,
        gradient_divisor=groups.loss.size if gradients == "mean" else 1,
        finished_steps=finished_steps,
        seen_tokens=seen_tokens,
    )
    for router in routers:
        router.config.loop = loop
    balance = Balance(parts, wire_parts(parts, groups), groups, finished_steps)
    for part in parts:
        _keep_records_apart(part)
    if optimizer is not None:
        getattr(optimizers[0], _BEFORE_STEP)(lambda *args, **kwargs: balance.close_step())
    return balance


class Balance:
    """The balance of a model in a loop that is not torchtitan's trainer."""

    def __init__(
        self,
        model_parts: list[nn.Module],
        hook: StepHook | None,
        groups: RankGroups,
        finished_steps: int,
    ) -> None:
        """
        Args:
            hook: of the MoE layers; None on a pipeline stage without any.
        """
        self.model_parts = model_parts
        self.groups = groups
        self._hook = hook
        self._first_step = finished_steps
        self._closed_steps = 0

    @property
    def finished_steps(self) -> int:
        """Optimizer steps so far, those of the checkpoint included."""
        return self._first_step + self._closed_steps

    @property
    def seen_tokens(self) -> int:
        """Tokens of all closed steps over all ranks, padding and those of the checkpoint included.
        Between two steps, and where something changes after a number of tokens.

        Raises:
            JobError: nobody counts them.
        """
        if self._hook is None or not self._hook.tokens.counted:
            raise JobError(
                "nothing on this rank changes after a number of tokens, so that nobody counts them"
            )
        self._hook.tokens.read()
        return self._hook.tokens.total

    def begin_step(self, rows: int, *, loss_scale: float = 1.0) -> None:
        """Say what the step that begins has, before its first forward. What was counted since the
        last closed step is forgotten: it was skipped.

        Args:
            rows: of the global batch, over all ranks.
            loss_scale: what a gradient scaler multiplies the loop's own loss by.

        Raises:
            JobError: there are no rows, or the scale is no finite number above 0.
        """
        _require_at_least(1, "begin_step(rows)", rows)
        if not 0 < loss_scale < math.inf:
            raise JobError(
                f"begin_step(loss_scale) is {loss_scale}; it must be a finite number above 0"
            )
        if self._hook is not None:
            if self._hook.has_begun:
                self._hook.skip_step()
            self._hook.begin_step(rows, loss_scale)

    def skip_step(self) -> None:
        """The optimizer does not step, as after gradients that are not finite."""
        if self._hook is not None:
            self._hook.skip_step()

    def close_step(self) -> None:
        """The optimizer is about to step. Collective over the ranks that route other tokens."""
        if self._hook is not None:
            self._hook.close_step()
        self._closed_steps += 1

    def load(self) -> StepLoad:
        """Tokens of every expert and columns of every layer in the last closed step.
        Collective: call on every rank.

        Raises:
            JobError: no step was closed, or not on every rank; it had other rows than announced;
                the gate of a layer is not finite. The same on every rank.
        """
        self._compare_ranks()
        if self._hook is not None:
            self._hook.check_announced_rows()
        return reduce_step(moe_layers_of(self.model_parts), self.groups)

    def _compare_ranks(self) -> None:
        """Find out on every rank what is wrong on any, so that all raise and none waits for another
        in a collective. Collective, with the same shape whatever a rank has done."""
        broken = not_finite(moe_layers_of(self.model_parts))
        announced = None if self._hook is None else self._hook.announced_rows
        # The largest of each, and the largest of each with the other sign: the smallest.
        most = torch.tensor(
            [
                self._closed_steps,
                -self._closed_steps,
                *((_NONE, _NONE) if announced is None else (announced, -announced)),
                max(broken, default=_NONE),
            ],
            device=utils.device_type,
        )
        for group in self.groups.loop:
            dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
        closed, fewest, rows, fewest_rows, layer = most.tolist()
        if not closed:
            raise JobError(
                "no optimizer step has ended yet: ask for metrics() after optimizer.step() (or "
                "close_step(), without an optimizer)"
            )
        if closed != -fewest:
            raise JobError(
                f"a rank has ended {closed} optimizer steps and another {-fewest}: call "
                "optimizer.step() (or close_step()) on every rank, also on one without a batch"
            )
        if rows != -fewest_rows and rows != _NONE:
            raise JobError(
                f"begin_step(rows) announced {rows} on a rank and {-fewest_rows} on another: give "
                "each the rows of the global batch, over all ranks"
            )
        if layer != _NONE:
            raise JobError(
                f"the gate or the expert bias of layer {layer} is not finite: go on from a "
                "checkpoint, and call skip_step() in place of optimizer.step() after gradients "
                "that are not finite"
            )

    def metrics(self, *, per_layer: bool = False, num_extreme_experts: int = 0) -> dict[str, float]:
        """The numbers of the last closed step over all ranks and micro-batches, by name
        (docs/telemetry.md); none of a step in which no rank has routed a token. Collective: call on
        every rank.

        Args:
            per_layer: also every layer's own, ``moe/<name>_layer_<number>``.
            num_extreme_experts: name that many of the hottest and of the coldest experts.

        Raises:
            JobError: as :meth:`load`.
        """
        load = self.load()
        return sink_metrics(
            load, columns_in(load), per_layer=per_layer, num_extreme_experts=num_extreme_experts
        )


_NONE = -(2**62)
_BEFORE_STEP = "register_step_pre_hook"
"""Of torch's optimizers and of torchtitan's container."""


def _keep_records_apart(part: nn.Module) -> None:
    """torch's DistributedDataParallel copies the buffers of rank 0 to all, at every forward."""
    records = [
        f"{name}.{buffer}"
        for name, module in part.named_modules()
        if isinstance(module, RouterRecord)
        for buffer, _tensor in module.named_buffers()
    ]
    others = getattr(part, "_ddp_params_and_buffers_to_ignore", [])
    part._ddp_params_and_buffers_to_ignore = [*others, *records]  # type: ignore[assignment]


def _require_at_least(least: int, where: str, given: Any) -> None:
    try:
        number = operator.index(given)
    except TypeError:
        number = least - 1
    if number < least or isinstance(given, bool):
        raise JobError(f"{where} is {given!r}; it must be a whole number of at least {least}")


def _check(parts: list[nn.Module], routers: list[LoadBalancedRouter], groups: RankGroups) -> None:
    if any(router.record is not None for router in routers):
        raise JobError(
            "the model has its training loop already: attach() it once, and not to a model that "
            "torchtitan's Trainer trains; copy a model before attach()"
        )
    if not routers and groups.stages.size == 1:
        modules = [module for part in parts for module in part.modules()]
        if any(isinstance(module, MoE) for module in modules):
            raise JobError(
                "the routers of the model are torchtitan's own: build it from the spec that "
                "titan_moe_lb.balanced(spec) returns"
            )
        raise JobError(
            f"{type(parts[0]).__name__} has no MoE layer of torchtitan: a layer is balanced where "
            "it is a torchtitan.models.common.moe.MoE; for a router of another kind, "
            "titan_moe_lb.functional has the losses of plain tensors"
        )
    for part in parts:
        for name, module in part.named_modules():
            if isinstance(module, MoE) and not isinstance(module.router, LoadBalancedRouter):
                raise JobError(
                    f"the router of {layer_name(name)} is a {type(module.router).__name__}, whose loads "
                    "nobody balances: build the model from the spec that "
                    "titan_moe_lb.balanced(spec) returns"
                )
            if isinstance(module, LoadBalancedRouter):
                check_router(layer_name(name), module.config)
                if groups.stages.size > 1:
                    refuse_in_parts(module.config, "pipeline parallelism")
    check_alike([(f"layer {router.layer}", router.config) for router in routers])
