"""``Balance``: steps and metrics of a model's balance in a user's training loop."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from titan_moe_lb.balancing.layer_checks import not_finite
from titan_moe_lb.balancing.router import moe_layers_of
from titan_moe_lb.balancing.self_test.faults import faults_of
from titan_moe_lb.balancing.self_test.result import SelfTest
from titan_moe_lb.balancing.self_test.run import measure
from titan_moe_lb.balancing.step_hook import StepHook
from titan_moe_lb.errors import JobError
from titan_moe_lb.parallel.rank_groups import RankGroups
from titan_moe_lb.telemetry.reduction import reduce_step
from titan_moe_lb.telemetry.sink_metrics import sink_metrics
from titan_moe_lb.telemetry.trace_columns import columns_in
from titan_moe_lb.traces.step_load import StepLoad

_NONE = -(2**62)
"""Placeholder for no number, below every number that ranks compare."""


class Balance:
    """Balance of a model in a loop other than torchtitan's Trainer; :func:`attach` creates it."""

    def __init__(
        self,
        model_parts: list[nn.Module],
        hook: StepHook | None,
        groups: RankGroups,
        finished_steps: int,
    ) -> None:
        """Create the balance of a rank.

        ``hook`` is None on a pipeline stage without MoE layers.
        """
        self.model_parts = model_parts
        self.groups = groups
        self._hook = hook
        self._first_step = finished_steps
        self._closed_steps = 0

    @property
    def finished_steps(self) -> int:
        """Optimizer steps so far, including those of the checkpoint."""
        return self._first_step + self._closed_steps

    @property
    def seen_tokens(self) -> int:
        """Tokens of all closed steps over all ranks, including padding and the checkpoint's tokens.

        Read it between two steps.

        Raises:
            JobError: no loss and no bias rule changes after a number of tokens.
        """
        if self._hook is None or not self._hook.tokens.counted:
            raise JobError(
                "nothing on this rank changes after a number of tokens, so tokens are not counted"
            )
        self._hook.tokens.read()
        return self._hook.tokens.total

    def begin_step(self, rows: int, *, loss_scale: float = 1.0) -> None:
        """Announce a step before its first forward, and drop counts since the last closed step.

        Args:
            rows: rows of the global batch, over all ranks.
            loss_scale: factor by which a gradient scaler multiplies the loop's own loss.

        Raises:
            JobError: ``rows`` is below 1, or the scale is no finite number above 0.
        """
        require_at_least(1, "begin_step(rows)", rows)
        if not 0 < loss_scale < math.inf:
            raise JobError(
                f"begin_step(loss_scale) is {loss_scale}; it must be a finite number above 0"
            )
        if self._hook is not None:
            if self._hook.has_begun:
                self._hook.skip_step()
            self._hook.begin_step(rows, loss_scale)

    def skip_step(self) -> None:
        """Drop the counts of a step that the optimizer skips, as after NaN gradients."""
        if self._hook is not None:
            self._hook.skip_step()

    def close_step(self) -> None:
        """Close a step just before the optimizer steps.

        Collective over the ranks that route different tokens.
        """
        if self._hook is not None:
            self._hook.close_step()
        self._closed_steps += 1

    def load(self) -> StepLoad:
        """Return the tokens of every expert and the columns of every layer in the last closed step.

        Collective: call it on every rank.

        Raises:
            JobError: no step was closed, or not on every rank; the step had other rows than
                announced; the gate of a layer is not finite. The error is the same on every rank.
        """
        self._compare_ranks()
        if self._hook is not None:
            self._hook.check_announced_rows()
        return reduce_step(moe_layers_of(self.model_parts), self.groups)

    def check(self, forward_backward: Callable[[], Any], optimizer: Any = None) -> SelfTest:
        """Test that every loss reaches its gate, and that every bias moves and is read.

        The test runs some forwards and backwards and a step without gradients. It leaves parameters,
        gradients, biases, counts and random numbers as they were; what an optimizer advances without
        gradients, it advances. Collective: call it on every rank, between two steps. ``print()``
        shows the result.

        Args:
            forward_backward: function that runs one forward of a batch and its backward, as the loop
                does. It is called several times and must use the same batch.
            optimizer: optimizer that the loop steps, or a sequence of them; None: the loop calls
                :meth:`close_step`.

        Raises:
            JobError: the model is split over a pipeline, or has no loss and no bias.
        """
        if self.groups.stages.size > 1:
            raise JobError("check() needs all layers on every rank: build it without a pipeline")
        if self._hook is None:
            raise JobError("check() finds no balanced layer: set aux_losses or expert_bias")
        closed = self._closed_steps
        try:
            measured = measure(self.model_parts, self._hook, forward_backward, optimizer)
        finally:
            self._closed_steps = closed
        return SelfTest(measured, faults_of(measured))

    def _compare_ranks(self) -> None:
        """Raise an error of any rank on every rank, so that no rank waits in a later collective.

        Collective, with the same shape whatever a rank has done.
        """
        broken = not_finite(moe_layers_of(self.model_parts))
        announced = None if self._hook is None else self._hook.announced_rows
        # The maxima of the negated numbers are the negated minima.
        most = torch.tensor(
            [
                self._closed_steps,
                -self._closed_steps,
                *((_NONE, _NONE) if announced is None else (announced, -announced)),
                max(broken, default=_NONE),
            ],
            device=next(self.model_parts[0].parameters()).device,
        )
        for group in self.groups.loop:
            dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
        closed, fewest, rows, fewest_rows, layer = most.tolist()
        if not closed:
            raise JobError(
                "no optimizer step has ended yet: call metrics() after optimizer.step() (or "
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
                f"the gate or the expert bias of layer {layer} is not finite: continue from a "
                "checkpoint, and call skip_step() in place of optimizer.step() after gradients "
                "that are not finite"
            )

    def metrics(self, *, per_layer: bool = False, num_extreme_experts: int = 0) -> dict[str, float]:
        """Return the metrics of the last closed step over all ranks and micro-batches, by name.

        docs/reference/metrics.md describes them. The result is empty if no rank routed a token.
        Collective: call it on every rank.

        Args:
            per_layer: True to add the metrics of every layer, ``moe/<name>_layer_<number>``.
            num_extreme_experts: number of hottest and of coldest experts to add.

        Raises:
            JobError: as :meth:`load`.
        """
        load = self.load()
        return sink_metrics(
            load, columns_in(load), per_layer=per_layer, num_extreme_experts=num_extreme_experts
        )


def require_at_least(least: int, where: str, given: Any) -> None:
    """Raise ``JobError`` for an argument ``where`` that is no whole number of at least ``least``."""
    try:
        number = operator.index(given)
    except TypeError:
        number = least - 1
    if number < least or isinstance(given, bool):
        raise JobError(f"{where} is {given!r}; it must be a whole number of at least {least}")
