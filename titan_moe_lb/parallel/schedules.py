"""Pipeline schedules: which a job can name, what each rank does in what order, what it holds.

An action is ``(stage, kind, micro_batch)``; kinds are those of torch.distributed.pipelining:
"F" forward, "B" whole backward, "I" and "W" backward of the inputs and of the weights. What a
micro-batch keeps is kept from its forward until its B, or its W, has ended: until then the
pass for the weights needs the inputs of the experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

ZERO_BUBBLE_SCHEDULES = ("ZBVZeroBubble", "InterleavedZeroBubble", "DualPipeV")
"""Schedules that run the backward of a stage in two passes."""

SCHEDULES = ("1F1B", "GPipe", "Interleaved1F1B", "LoopedBFS", *ZERO_BUBBLE_SCHEDULES)
"""Schedules of torch.distributed.pipelining that can be named in a job."""

KINDS = ("F", "B", "I", "W")

Action = tuple[int, str, int]
Schedule = dict[int, list[Action]]
"""By pipeline rank, in the order in which the rank runs them."""


def actions_of(pp_schedule: Any) -> Schedule:
    """What each rank computes in one run of a pipeline: one pass over its local batch.

    With gradient accumulation an optimizer step is several runs, and nothing is kept
    between them. The micro-batches of a run are numbered from 0.

    Args:
        pp_schedule: a schedule of torch.distributed.pipelining, also one read from a CSV
            file; None without pipeline parallelism, which is one stage and one micro-batch.
    """
    if pp_schedule is None:
        return one_forward_one_backward(1, 1)
    from torch.distributed.pipelining import Schedule1F1B

    if isinstance(pp_schedule, Schedule1F1B):
        # Upstream fact: torch 2.14 and 2.15 write this schedule down with the forwards of the
        # last stage numbered from 1, and run it from 0.
        return one_forward_one_backward(pp_schedule._num_stages, pp_schedule._n_microbatches)
    return {
        rank: [action for entry in entries for action in _computations(entry)]
        for rank, entries in pp_schedule.pipeline_order.items()
    }


def _computations(entry: Any) -> list[Action]:
    """Those in one entry of torch's list; communication and idling are left out.

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
    """1F1B: as many forwards as there are stages behind, then one of each in turn."""
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
    """The stages of a rank, ascending: the order of its model parts in torchtitan."""
    return sorted({stage for stage, _kind, _micro_batch in actions})


def peak(
    actions: Sequence[Action],
    kept: Callable[[int, int], Any],
    working: Callable[[int, int], Any] = lambda stage, micro_batch: 0.0,
    left: Callable[[int], Any] = lambda stage: 0.0,
) -> Any:
    """The most that one rank holds at a time, in the unit of what it is given.

    Args:
        actions: the rank's own.
        kept: ``kept(stage, micro_batch)``, what a micro-batch of a stage keeps until its B or
            W has ended, at least 0: tokens or bytes, numbers or arrays of one shape (one
            entry for each accumulation step, or for each rank of the EP group).
        working: what it needs besides while it runs.
        left: ``left(stage)``, what its B or W leaves until the end.

    Returns:
        The peak, of the same shape: each entry's own.
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
