"""Pipeline schedules: their names, the actions of each rank in order, and peaks of its memory.

An action is ``(stage, kind, micro_batch)``; kinds are those of torch.distributed.pipelining:
"F" forward, "B" whole backward, "I" and "W" backward of the inputs and of the weights. The
tensors of a micro-batch are kept from its forward until its B or W has ended: the backward of
the weights needs the inputs of the experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

ZERO_BUBBLE_SCHEDULES = ("ZBVZeroBubble", "InterleavedZeroBubble", "DualPipeV")
"""Schedules that run the backward of a stage in two passes."""

SCHEDULES = ("1F1B", "GPipe", "Interleaved1F1B", "LoopedBFS", *ZERO_BUBBLE_SCHEDULES)
"""Schedules of torch.distributed.pipelining that a job can name."""

KINDS = ("F", "B", "I", "W")

Action = tuple[int, str, int]
Schedule = dict[int, list[Action]]
"""Actions by pipeline rank, in the order in which the rank runs them."""


def actions_of(pp_schedule: Any) -> Schedule:
    """List the actions of each rank in one run of a pipeline: one pass over its local batch.

    With gradient accumulation an optimizer step consists of several runs, and no tensors are kept
    between them. The micro-batches of a run are numbered from 0.

    Without pipeline parallelism (None) there is one stage and one micro-batch. Schedules from a CSV
    file are valid.
    """
    if pp_schedule is None:
        return one_forward_one_backward(1, 1)
    from torch.distributed.pipelining import Schedule1F1B

    if isinstance(pp_schedule, Schedule1F1B):
        # Upstream fact: torch 2.14 and 2.15 list this schedule with the forwards of the last stage
        # numbered from 1, and run it from 0.
        return one_forward_one_backward(pp_schedule._num_stages, pp_schedule._n_microbatches)
    return {
        rank: [action for entry in entries for action in _computations(entry)]
        for rank, entries in pp_schedule.pipeline_order.items()
    }


def _computations(entry: Any) -> list[Action]:
    """List the actions in one entry of torch's list, without communication and idling.

    An overlapped forward and backward is an entry of two, which torch runs one by one.
    """
    if entry is None:
        return []
    return [
        (action.stage_index, action.computation_type.value, action.microbatch_index)
        for action in entry.sub_actions or (entry,)
        if action.computation_type.value in KINDS
    ]


def one_forward_one_backward(num_ranks: int, num_micro_batches: int) -> Schedule:
    """Build the 1F1B schedule: warm-up forwards, then a backward and a forward in turn."""
    schedule = {}
    for rank in range(num_ranks):
        warmup = min(num_micro_batches, num_ranks - rank)
        actions: list[Action] = [(rank, "F", m) for m in range(warmup)]
        for backward in range(num_micro_batches):
            actions.append((rank, "B", backward))
            if warmup + backward < num_micro_batches:
                actions.append((rank, "F", warmup + backward))
        schedule[rank] = actions
    return schedule


def stages_of(actions: Sequence[Action]) -> list[int]:
    """List the stages of a rank, ascending, which is the order of its model parts in torchtitan."""
    return sorted({stage for stage, _kind, _micro_batch in actions})


def peak(
    actions: Sequence[Action],
    kept: Callable[[int, int], Any],
    working: Callable[[int, int], Any] = lambda stage, micro_batch: 0.0,
    left: Callable[[int], Any] = lambda stage: 0.0,
) -> Any:
    """Compute the most that one rank holds at a time, in the unit of ``kept``.

    Args:
        actions: actions of the rank.
        kept: ``kept(stage, micro_batch)``, at least 0, held by a micro-batch of a stage until its
            B or W has ended: tokens or bytes, numbers or arrays of one shape (one entry for each
            accumulation step, or for each rank of the EP group).
        working: ``working(stage, micro_batch)``, needed in addition while an action runs.
        left: ``left(stage)``, held from its B or W until the end.

    Returns:
        The peak of each entry, in the same shape.
    """
    held: Any = 0.0
    most: Any = 0.0
    for stage, kind, micro_batch in actions:
        if kind == "F":
            held = held + kept(stage, micro_batch)
        most = np.maximum(most, held + working(stage, micro_batch))
        if kind in "BW":
            held = held - kept(stage, micro_batch) + left(stage)
    return most
