"""Record of a step of a rank's routers, on the device and without host reads.

Shape suffixes: N = routers of the rank, M = micro-batches of a step, S = count sources, A = losses, B = rows
and L = tokens of a row in a micro-batch, E = experts, K = top_k, H = bins of a histogram.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from titan_moe_lb.balancing.recording.recomputation import is_recomputation
from titan_moe_lb.balancing.recording.score_sums import ScoreSums, ScoreTotals, StepScores
from titan_moe_lb.errors import JobError

MOST_OBSERVATIONS = torch.iinfo(torch.int32).max
"""Largest number of tokens in a step of a bias rule with a histogram, over all ranks: 2**31 - 1."""


def histogram_of(rows: torch.Tensor, num_experts: int, num_bins: int) -> torch.Tensor:
    """Select the histograms of routers with E experts and H bins from rows ``(..., E, H)``.

    Rows have the largest E and H of all routers; a router uses a contiguous part of its row.
    """
    return rows.flatten(-2)[..., : num_experts * num_bins].unflatten(-1, (num_experts, num_bins))


class RouterRecord(nn.Module):
    """Rows of one router in a :class:`StepRecord`.

    They are buffers, outside of checkpoints, because torch's pipeline stages infer shapes by a real
    forward and then restore the buffers of a stage.

    Attributes:
        counts_MSE, losses_A, histogram_EH, expert_ids_MBLK: see :class:`StepRecord`.
        counts: flat row of the whole table, sized for the largest router; ``counts_MSE`` is the part
            that this router uses.
        micro_batch: forwards of the running step so far, int64 ``(1,)``; 0 if M is 1.
        weights_A: factor of the gradient of each loss, weight / G, float32.
        steps: finished steps, including those of the checkpoint, int64 ``(1,)``.
        one: 1, int64 ``()``, added to a count for each token.
        last_slot: index of the last micro-batch, to which forwards beyond M are added; None if
            there are none beyond M.
        scores: sums of its scores; None in a job that does not record them.
    """

    counts_MSE: torch.Tensor
    counts: torch.Tensor
    losses_A: torch.Tensor
    histogram_EH: torch.Tensor | None
    expert_ids_MBLK: torch.Tensor | None
    micro_batch: torch.Tensor
    weights_A: torch.Tensor
    steps: torch.Tensor
    one: torch.Tensor

    def __init__(
        self, *, last_slot: int | None, scores: ScoreSums | None, **rows: torch.Tensor | None
    ) -> None:
        super().__init__()
        self.last_slot, self.scores = last_slot, scores
        for name, row in rows.items():
            self.register_buffer(name, row, persistent=False)
        slots, sources, self.num_experts = self.counts_MSE.shape
        self._per_slot = self.counts.shape[0] // slots
        self._per_source = self._per_slot // sources

    def _apply(self, fn, recurse: bool = True) -> RouterRecord:
        """Ignore moves and casts of the model: the rows are views of one table of all routers."""
        return self

    def forward_number(self) -> torch.Tensor:
        """Return the number of earlier forwards of this router, int64 ``()``.

        It is ``steps`` times M plus the forwards of the running step.
        """
        return (self.steps * self.counts_MSE.shape[0] + self.micro_batch).squeeze(0)

    @property
    def _slot(self) -> torch.Tensor:
        """Micro-batch of the running forward in the record, int64 ``(1,)``."""
        if self.last_slot is None:
            return self.micro_batch
        return self.micro_batch.clamp(max=self.last_slot)

    def add_counts(self, source: int, ids_BLK: torch.Tensor, number: torch.Tensor) -> None:
        """Add the tokens of one forward to the record, without a temporary table of counts."""
        counts, first = self.counts, source * self._per_source
        places = torch.add(ids_BLK, self._slot, alpha=self._per_slot).reshape(-1)
        tokens = number.expand_as(ids_BLK).reshape(-1)
        counts.narrow(0, first, counts.shape[0] - first).index_add_(0, places, tokens)

    def note_ids(self, expert_ids_BLK: torch.Tensor) -> None:
        """Record the selected experts of one forward, in a job that records them."""
        if self.expert_ids_MBLK is not None:
            ids_1BLK = expert_ids_BLK.to(self.expert_ids_MBLK.dtype).unsqueeze(0)
            self.expert_ids_MBLK.index_copy_(0, self._slot, ids_1BLK)

    def add_dot(self, loss: int, left: torch.Tensor, right: torch.Tensor) -> None:
        """Add the sum of the products of two tables to the value of a loss, in one operator."""
        row_1N = left.expand_as(right).reshape(1, -1)
        self.losses_A.narrow(0, loss, 1).addmv_(row_1N, right.reshape(-1))


@dataclass(frozen=True, slots=True)
class StepSums:
    """Sums of a finished step over its micro-batches and over the ranks that route its tokens."""

    counts_NSE: torch.Tensor
    """Tokens per expert, int64."""
    losses_NA: torch.Tensor
    """Raw values of the losses, float64."""
    scores: ScoreTotals | None
    """Sums of the scores; None in a job that does not record them."""


class StepRecord:
    """Running step of all routers of a rank, and the last finished step.

    The tables are stacked by router. Finishing a step and summing it over ranks therefore take the
    same number of operators for 4 layers and for 61. A router with fewer experts, choices or bins
    than another uses the first part of its row; the rest of the row stays 0.

    Attributes:
        counts_NMSE: tokens per expert of the running step, int64, of the S sources that are needed
            at the end of a step
            (:class:`titan_moe_lb.balancing.recording.sequence_tables.CountSources`).
        losses_NA: raw values of the losses, float32, summed over the rows of this rank.
        histogram_NEH: observations of the bias rule in the running step, int32; None without bins.
            At most :data:`MOST_OBSERVATIONS` tokens a step.
        expert_ids_NMBLK: experts of each token of the running step, uint8 up to 256 experts,
            else int32; None unless ``token_shape``.
        step_counts_NMSE, step_losses_NA: the same of the last finished step, the losses divided
            by the rows of its global batch.
        step_micro_batches: forwards in the last finished step, int64 ``(1,)``; None if every
            step has the same number, or M is 1.
        sums: sums of the last finished step over all ranks, after :meth:`reduce`.
        scores, weights_A: see :class:`RouterRecord`.
        rows, forwards, tokens: rows, forwards and tokens of the running step on this rank, which
            the host counts when a forward begins.
        learns: True while the model is in a forward that learns; None if unknown.
        of_copy: True if the record belongs to a copy of a model, whose steps no loop closes.
        gradient_squares_N2: leaf for :mod:`titan_moe_lb.balancing.gradient_norms`, float32; None
            unless gradient norms are measured.
        step_gradient_squares_N2: sums of squares of the last finished step; NaN if it was not
            measured.
        measures: True if the running step measures gradient norms.
        records_scores: True if the running step records the sums of the scores.
        bias_delta_N: last update of the expert bias of each router, float32 ``(E,)``; None without
            an update.
    """

    def __init__(
        self,
        *,
        num_routers: int,
        num_micro_batches: int,
        num_sources: int,
        num_experts: int,
        num_losses: int,
        num_bins: int = 0,
        token_shape: tuple[int, int, int] | None,
        device: torch.device,
        finished_steps: int = 0,
        varying: bool = False,
        joins_last: bool = False,
        gradients: bool = False,
        scores: bool = False,
    ) -> None:
        """Allocate the tables.

        ``num_experts`` and ``num_bins`` are the maxima of the routers, and ``num_micro_batches``
        that of the steps if ``varying``. ``token_shape`` is (B, L, K) of a micro-batch, to record
        the experts of each token. ``joins_last``: forwards after the M-th are added to micro-batch
        M - 1, because the host does not count forwards (pipelines). ``gradients``: measure gradient
        norms in the steps in which ``measures`` is True. ``scores``: record the sums of the scores
        in those in which ``records_scores`` is True.
        """

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(num_routers, *shape, dtype=dtype, device=device)

        self.counts_NMSE = zeros(num_micro_batches, num_sources, num_experts)
        self.step_counts_NMSE = torch.zeros_like(self.counts_NMSE)
        # Rows are multiples of 16 bytes: a compiler would copy an input without this alignment.
        self.losses_NA = zeros(-(-num_losses // 4) * 4, dtype=torch.float32)[:, :num_losses]
        self.step_losses_NA = torch.zeros_like(self.losses_NA)
        self._micro_batches_N1 = zeros(2)[:, :1]
        self._last_slot = num_micro_batches - 1 if joins_last and num_micro_batches > 1 else None
        counted = varying and num_micro_batches > 1
        self.step_micro_batches = torch.zeros_like(self._micro_batches_N1[0]) if counted else None
        self._steps = torch.full((1,), finished_steps, dtype=torch.int64, device=device)
        self._one = torch.ones((), dtype=torch.int64, device=device)
        self.weights_A = torch.zeros(num_losses, dtype=torch.float32, device=device)
        self.rows = self.forwards = self.tokens = 0
        self.learns: bool | None = None
        self.of_copy, self.measures, self.records_scores = False, gradients, scores
        self.sums: StepSums | None = None
        self.bias_delta_N: list[torch.Tensor | None] = [None] * num_routers
        self.histogram_NEH = zeros(num_experts, num_bins, dtype=torch.int32) if num_bins else None
        self.scores = StepScores(num_routers, num_experts, device) if scores else None
        self.gradient_squares_N2 = self.step_gradient_squares_N2 = None
        if gradients:
            self.gradient_squares_N2 = zeros(2, dtype=torch.float32).requires_grad_()
            self._running_squares_N2 = zeros(2, dtype=torch.float32)
            self.gradient_squares_N2.grad = self._running_squares_N2
            self.step_gradient_squares_N2 = zeros(2, dtype=torch.float32)
        self.expert_ids_NMBLK = None
        if token_shape is not None:
            ids_type = torch.uint8 if num_experts <= 256 else torch.int32
            self.expert_ids_NMBLK = zeros(num_micro_batches, *token_shape, dtype=ids_type)

    def __deepcopy__(self, memo: dict[int, Any]) -> StepRecord:
        copied = memo[id(self)] = object.__new__(StepRecord)
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo), of_copy=True)
        return copied

    def router(self, index: int, num_experts: int, top_k: int, num_bins: int) -> RouterRecord:
        """Create the record of one router."""
        ids, histogram = self.expert_ids_NMBLK, None
        if self.histogram_NEH is not None and num_bins:
            histogram = histogram_of(self.histogram_NEH[index], num_experts, num_bins)
        return RouterRecord(
            last_slot=self._last_slot,
            scores=None if self.scores is None else self.scores.router(index, num_experts),
            counts_MSE=self.counts_NMSE[index, ..., :num_experts],
            counts=self.counts_NMSE[index].view(-1),
            losses_A=self.losses_NA[index],
            micro_batch=self._micro_batches_N1[index],
            weights_A=self.weights_A,
            steps=self._steps,
            one=self._one,
            histogram_EH=histogram,
            expert_ids_MBLK=None if ids is None else ids[index, ..., :top_k],
        )

    def check_forward(self, layer: int) -> None:
        """Raise ``JobError`` for a learning forward of a layer whose step no loop closes."""
        if self.of_copy:
            raise JobError(
                f"layer {layer} belongs to a copy of an attached model, whose steps nobody closes: copy "
                "the model before attach(), then attach() every copy that learns"
            )
        if self.learns is False and not is_recomputation():
            raise JobError(
                f"layer {layer} runs outside a forward of the model that attach() was given, so that "
                "its micro-batches are not counted: call that model, or attach() the one that is called"
            )

    def finish_forward(self, routers: slice) -> None:
        """Advance some routers to the next micro-batch.

        One operator advances all routers of a model part.
        """
        if self.counts_NMSE.shape[1] > 1:
            self._micro_batches_N1[routers].add_(1)

    def finish_step(self, num_rows: int) -> None:
        """Save the running step as the finished one, and reset all but the histogram."""
        self.step_counts_NMSE.copy_(self.counts_NMSE)
        torch.mul(self.losses_NA, 1 / num_rows, out=self.step_losses_NA)
        if self.step_gradient_squares_N2 is not None:
            if self.measures:
                self.step_gradient_squares_N2.copy_(self._running_squares_N2)
            else:
                self.step_gradient_squares_N2.fill_(math.nan)
        if self.step_micro_batches is not None:
            self.step_micro_batches.copy_(self._micro_batches_N1[0])
        if self.scores:
            self.scores.finish_step()
        self._start_anew()
        self._steps.add_(1)
        self.sums = None

    def resume(self, finished_steps: int) -> None:
        """Read the finished steps of a checkpoint, before the first step."""
        self._steps.fill_(finished_steps)

    def discard_step(self) -> None:
        """Drop the running step."""
        self._start_anew()
        self.forget_histogram()

    def _start_anew(self) -> None:
        scores = self.scores.running if self.scores else []
        torch._foreach_zero_([self.counts_NMSE, self.losses_NA, self._micro_batches_N1, *scores])
        if self.gradient_squares_N2 is not None:
            self._running_squares_N2.zero_()
        self.rows = self.forwards = self.tokens = 0

    def reduce_histogram(self, groups: Sequence[dist.ProcessGroup]) -> None:
        """Sum the histogram of the finished step over the ranks, in place. Collective.

        A step ends with this sum, the update of the biases, and :meth:`forget_histogram`.
        """
        if self.histogram_NEH is not None:
            for group in groups:
                dist.all_reduce(self.histogram_NEH, group=group)

    def forget_histogram(self) -> None:
        """Reset the histogram, once the biases have been updated."""
        if self.histogram_NEH is not None:
            self.histogram_NEH.zero_()

    def reduce(self, groups: Sequence[dist.ProcessGroup]) -> StepSums:
        """Sum the finished step over all micro-batches and ranks, once. Collective."""
        if self.sums is None:
            scores = self.scores.parts if self.scores else ()
            parts = [self.step_counts_NMSE.sum(dim=1), self.step_losses_NA, *scores]
            # float64 is exact for counts up to 2**53, and the losses share the collective.
            fused = torch.cat([part.flatten().double() for part in parts])
            for group in groups:
                dist.all_reduce(fused, group=group)
            tables = fused.split([part.numel() for part in parts])
            counts, losses, *others = (
                table.view(part.shape) for table, part in zip(tables, parts, strict=True)
            )
            self.sums = StepSums(counts.long(), losses, ScoreTotals(*others) if others else None)
        return self.sums
