"""Step hook of a rank: it begins a step (divides weights by rows) and closes it (bias, record)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from titan_moe_lb.balancing.gradient_norms import GradientNorms
from titan_moe_lb.balancing.layer_checks import check_tensors, warn_without_effect
from titan_moe_lb.balancing.layer_stack import stacks_of
from titan_moe_lb.balancing.losses.base import AuxLoss
from titan_moe_lb.balancing.own_dtypes import keep_dtypes
from titan_moe_lb.balancing.part_hooks import PartHooks
from titan_moe_lb.balancing.recording.recomputation import is_recomputation
from titan_moe_lb.balancing.recording.seen_tokens import SeenTokens
from titan_moe_lb.balancing.recording.step_record import MOST_OBSERVATIONS, StepRecord
from titan_moe_lb.balancing.router import (
    LoadBalancedRouter,
    moe_layers_of,
    routers_of,
)
from titan_moe_lb.balancing.valid_tokens.model_input import register_token_mask
from titan_moe_lb.balancing.value_schedule import changes_after_tokens
from titan_moe_lb.errors import JobError
from titan_moe_lb.parallel.local_shard import local_shard
from titan_moe_lb.parallel.rank_groups import RankGroups


def wire_parts(model_parts: list[nn.Module], groups: RankGroups) -> StepHook | None:
    """Connect the routers of this rank's pipeline stages to their loop, once before training.

    Returns:
        The hook that closes a step; None if no router needs one.
    """
    layers = moe_layers_of(model_parts)
    for layer in layers:
        keep_dtypes(layer)
    record = None
    if layers:
        record = wire([layer.router for layer in layers], groups)  # type: ignore[misc]
    for part in model_parts:
        register_token_mask(part, routers_of([part]), groups)
    if record is None:
        return None
    # Under a pipeline, weights of an earlier stage may learn, which this rank cannot see.
    if groups.stages.size == 1:
        warn_without_effect(model_parts)
    hook = StepHook(layers, record, groups)
    first = 0
    for part in model_parts:
        last = first + len(moe_layers_of([part]))
        PartHooks(part, record, slice(first, last), hook if part is model_parts[0] else None)
        first = last
    return hook


def wire(routers: list[LoadBalancedRouter], groups: RankGroups) -> StepRecord | None:
    """Pass one record and the process groups to the routers of a rank.

    Returns:
        The record; None if no router needs one.
    """
    config, loop = routers[0].config, routers[0].config.loop
    for router in routers:
        router.wire(groups)
    losses, num_sources = routers[0].aux_losses, routers[0].sources.num_at_step_end
    by_micro_batch = (
        loop.track or loop.recorded_tokens is not None or config.forced_routing is not None
    )
    if not (by_micro_batch or len(losses) or any(router.needs_step_counts for router in routers)):
        return None
    record = StepRecord(
        num_routers=len(routers),
        num_micro_batches=loop.num_micro_batches if by_micro_batch else 1,
        num_sources=num_sources,
        num_experts=max(router.num_experts for router in routers),
        num_losses=len(losses),
        num_bins=0
        if config.forced_routing is not None
        else max(router.num_bins for router in routers),
        token_shape=(*loop.recorded_tokens, max(router.top_k for router in routers))
        if loop.recorded_tokens
        else None,
        device=local_shard(routers[0].gate.weight).device,
        finished_steps=loop.finished_steps,
        varying=loop.varying,
        joins_last=loop.varying and groups.stages.size > 1,
        gradients=loop.gradients_every > 0,
        scores=loop.scores_every > 0,
    )
    for index, router in enumerate(routers):
        router.note_in(record, index)
        if record.gradient_squares_N2 is not None:
            GradientNorms(router, record, index)
    return record


class StepHook:
    """Begin and end of the steps of a rank's MoE layers; layers that are alike share operators.

    Attributes:
        finished_steps: finished optimizer steps, including those of the checkpoint.
        tokens: tokens of the finished steps.
        announced_rows: rows that the loop announced for the last closed step; 0 for none.
        layers, routers, losses: layers of the rank, their routers, and the losses of the first one.
        record: record of the routers.
        groups: process groups of the rank.
        rows_of_every_step: rows of every step over all ranks; None if they differ.
        weights: factors of the gradients that the record has; None: a step writes them anew.
    """

    def __init__(self, layers: list[Any], record: StepRecord, groups: RankGroups) -> None:
        """Create the hook, and begin the first step if all steps have the same number of rows."""
        self.layers = layers
        self.routers: list[LoadBalancedRouter] = [layer.router for layer in layers]
        self.losses: list[AuxLoss] = list(self.routers[0].aux_losses.values())  # type: ignore[arg-type]
        self.record = record
        self._stacks = stacks_of(layers, record)
        self.groups = groups
        # A pipeline infers shapes by a forward that the loop does not announce.
        self._counts_rows = groups.stages.size == 1
        self._loop = self.routers[0].config.loop
        self.finished_steps = self._loop.finished_steps
        per_step = self._loop.tokens_per_step
        self.tokens = SeenTokens(
            self._loop.seen_tokens,
            per_step,
            counted=per_step is None
            and any(changes_after_tokens(router.config) for router in self.routers),
        )
        self.rows_of_every_step, self._micro_batch_size = self._loop.announced_rows, None
        local = next((loss.config.local_batch_size for loss in self.losses), None)
        if local is not None:
            passes = self._loop.accumulation_steps
            self.rows_of_every_step = local * groups.batch.size * passes
            self._micro_batch_size = local * passes // self._loop.num_micro_batches
        self._global_rows: int | None = None
        self._closed_rows = self.announced_rows = 0
        self.weights: list[float] | None = None
        self._sample_step()
        self._begin_step_if_alike()

    def _begin_step_if_alike(self) -> None:
        """Begin a step if all steps have the same number of rows and it has not begun."""
        self.tokens.read()
        if self._global_rows is None and self.rows_of_every_step is not None:
            self.begin_step(self.rows_of_every_step)

    def _sample_step(self) -> None:
        """Decide if the next step measures the gradients at the routers, and records scores."""
        step = self.finished_steps + 1
        self.record.measures = self._loop.measures_gradients(step)
        self.record.records_scores = self._loop.records_scores(step)

    def begin_step(self, num_rows: int, loss_scale: float = 1.0) -> None:
        """Set the weights of the losses for a step, before its first forward.

        The gradient of a loss is that of ``weight * sum over the rows / num_rows``. A loop whose
        steps have equally many rows needs no call: the end of a step begins the next.

        ``loss_scale`` is the divisor that the loop applies to the gradients of this step, besides
        the ``gradient_divisor`` of every step.
        """
        self._global_rows = num_rows
        self.tokens.read()
        weights = [
            loss.weight_at(self.finished_steps + 1, self.tokens.total)
            * (loss_scale * self._loop.gradient_divisor)
            / (num_rows * self.groups.token_replicas)
            for loss in self.losses
        ]
        # Copy to the device only if they changed.
        if weights != self.weights:
            self.weights = weights
            self.record.weights_A.copy_(torch.tensor(weights))

    def resume(self, finished_steps: int, tokens: int) -> None:
        """Read the progress of a checkpoint, before the first step."""
        self.finished_steps, self.tokens.total = finished_steps, tokens
        self.record.resume(finished_steps)
        self._sample_step()
        if self._global_rows is not None:
            self.begin_step(self._global_rows)

    def forward_begins(self, part: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Run before a forward of the rank's first model part."""
        self.record.learns = part.training and torch.is_grad_enabled()
        if not self.record.learns:
            return
        if is_recomputation():  # of a checkpoint around the whole model
            if self._counts_rows and not self.record.forwards:
                raise JobError(
                    "a reentrant checkpoint around the whole model runs its forward without "
                    "gradients, so that no token was counted: checkpoint with use_reentrant=False, "
                    "or each block"
                )
            return
        self._begin_step_if_alike()
        given = next(value for value in (*args, *kwargs.values()) if torch.is_tensor(value))
        shape = local_shard(given).shape
        self._check_observations(shape[:2].numel())
        rows = shape[0]
        if self._micro_batch_size not in (None, rows):
            raise JobError(
                f"the aux losses were bound to micro-batches of {self._micro_batch_size} "
                f"sequences and get {rows}: their weight would be wrong; set "
                "training.local_batch_size (or parallelism.pipeline_parallel_microbatch_size) to "
                "what the loop feeds"
            )
        if self.losses and self._global_rows is None:
            raise JobError(
                "the aux losses are a mean over the rows of a step, whose number was not announced: "
                "call begin_step(rows) before its first forward, or "
                "attach(..., rows_per_step=...)"
            )
        if not self._counts_rows:
            return
        record = self.record
        if not record.forwards:
            check_tensors(self.layers, record.counts_NMSE.device)
        record.rows += rows
        record.forwards += 1
        if self.losses:
            self._check_step()
        if self._loop.track and record.forwards > self._loop.num_micro_batches:
            raise JobError(
                f"forward {record.forwards} of one optimizer step exceeds the announced "
                f"{self._loop.num_micro_batches}: call skip_step() after a skipped step, or raise "
                "attach(..., max_micro_batches=...)"
            )

    def _check_observations(self, tokens: int) -> None:
        """Add a forward's tokens to the running step, and check that a histogram can hold them."""
        self.record.tokens += tokens
        most = MOST_OBSERVATIONS // self.groups.loss.size
        if self.record.histogram_NEH is not None and self.record.tokens > most:
            raise JobError(
                f"an expert_bias with a histogram counts at most {MOST_OBSERVATIONS:,} tokens a "
                f"step, {most:,} on each rank, and this step has {self.record.tokens:,} on a rank: "
                'feed fewer rows a step, or choose another rule, such as "sign"'
            )

    def forward_ends(self) -> None:
        """Run after a forward of the first model part.

        Under a pipeline other parts may still be learning, so the state becomes unknown (None).
        """
        self.record.learns = False if self._counts_rows else None

    def _check_step(self) -> None:
        """Check the running step of a loop that counts and announces its rows."""
        assert self._global_rows is not None
        whole = [loss for loss in self.losses if not loss.additive]
        if whole and self.record.forwards > 1:
            raise JobError(
                f"{whole[0].type_name} is a loss of a rank's whole batch and is no sum over "
                "micro-batches: feed the rows of a step in one forward, or choose another loss"
            )
        if self.record.rows > self._global_rows:
            raise JobError(
                f"the step has {self.record.rows} rows on this rank and announced "
                f"{self._global_rows} on all: the weight of the aux losses would be wrong; call begin_step(rows) with "
                "what the step has, and skip_step() after one that is skipped"
            )

    def close_step(self) -> None:
        """Close the step just before the optimizer steps. Collective over the token groups."""
        self._begin_step_if_alike()
        self._closed_rows, self.announced_rows = self.record.rows, self._global_rows or 0
        if self.groups.batch.group is None:
            self.check_announced_rows()
        with torch.no_grad():
            self.record.finish_step(self._global_rows or 1)
            if any(router.needs_step_counts for router in self.routers) or self.tokens.counted:
                self.record.reduce(self.groups.tokens)
                self.record.reduce_histogram(self.groups.tokens)
            for stack in self._stacks:
                stack.move_bias(self.finished_steps + 1, self.tokens.total)
                stack.finish_losses()
            self.record.forget_histogram()
            self._forget_torchtitans_counts()
            self.tokens.finish_step(self.record.sums, self.routers[0].top_k)
        self.finished_steps += 1
        self._sample_step()
        self._global_rows = None
        # Where the device counts tokens, the next step begins at its first forward: the host may
        # read the count only then.
        if not self.tokens.counted:
            self._begin_step_if_alike()

    def check_announced_rows(self) -> None:
        """Compare the rows of the last closed step with the announced ones.

        Only loops whose rows are counted are checked. Collective over the data-parallel ranks.

        Raises:
            JobError: an aux loss was divided by another number of rows. A step without rows passes:
                it has no loss.
        """
        if not (self._counts_rows and self._loop.varying and self.announced_rows):
            return
        rows = self._closed_rows
        if self.groups.batch.group is not None:
            total = torch.tensor([rows], device=self.record.counts_NMSE.device)
            dist.all_reduce(total, group=self.groups.batch.group)
            rows = int(total)
        if rows not in (0, self.announced_rows) and self.losses:
            raise JobError(
                f"the step had {rows} rows and announced {self.announced_rows}: the weight of the "
                "aux losses was wrong; call begin_step(rows) with what each step has, and "
                "skip_step() after one that is skipped"
            )

    @property
    def has_begun(self) -> bool:
        """True if the running step counted a forward; always True under a pipeline, where none is."""
        return self.record.forwards > 0 or not self._counts_rows

    def skip_step(self) -> None:
        """Drop the counts of a step that the optimizer skips."""
        with torch.no_grad():
            self.record.discard_step()
            for stack in self._stacks:
                stack.finish_losses(skipped=True)
            self._forget_torchtitans_counts()

    def _forget_torchtitans_counts(self) -> None:
        """Reset torchtitan's own counters; we do not use them."""
        torch._foreach_zero_([local_shard(layer.tokens_per_expert_E) for layer in self.layers])
