"""A pipeline schedule replayed: how long it takes, and what it keeps in memory.

A schedule is the ordered list of actions of each pipeline rank. An action is
``(stage, kind, micro-batch)``; kinds are those of torch.distributed.pipelining: "F"
forward, "B" whole backward, "I" and "W" backward of the inputs and of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from titan_moe_lb.costmodel.load import Array

KINDS = ("F", "B", "I", "W")

Action = tuple[int, str, int]
Schedule = Mapping[int, Sequence[Action]]


def one_forward_one_backward(num_ranks: int, num_microbatches: int) -> Schedule:
    """1F1B: as many forwards as there are stages behind, then one of each in turn."""
    schedule = {}
    for rank in range(num_ranks):
        warmup = min(num_microbatches, num_ranks - rank)
        actions: list[Action] = [(rank, "F", m) for m in range(warmup)]
        for backward in range(num_microbatches):
            actions.append((rank, "B", backward))
            if warmup + backward < num_microbatches:
                actions.append((rank, "F", warmup + backward))
        schedule[rank] = actions
    return schedule


def makespan(schedule: Schedule, forward: Sequence[float], backward: Sequence[float]) -> float:
    """Seconds from the first forward to the last backward.

    A forward waits for that of the stage before, a backward for that of the stage after;
    a rank does one thing at a time; sending takes no time. Half of a split backward is
    its inputs', half its weights'.

    Args:
        forward, backward: seconds of each stage and micro-batch.
    """
    last = len(forward) - 1
    finished: dict[Action, float] = {}
    clock = dict.fromkeys(schedule, 0.0)
    position = dict.fromkeys(schedule, 0)
    waiting = sum(len(actions) for actions in schedule.values())
    while waiting:
        before = waiting
        for rank, actions in schedule.items():
            while position[rank] < len(actions):
                stage, kind, microbatch = action = actions[position[rank]]
                needs = _predecessor(action, last, finished)
                if needs is None:
                    break
                seconds = forward[stage] if kind == "F" else backward[stage]
                clock[rank] = max(clock[rank], needs) + seconds * (0.5 if kind in "IW" else 1.0)
                finished[action] = clock[rank]
                if kind == "I":
                    finished[stage, "B", microbatch] = clock[rank]
                position[rank] += 1
                waiting -= 1
        assert waiting < before, "the schedule waits for itself"
    return max(clock.values())


def _predecessor(action: Action, last: int, finished: dict[Action, float]) -> float | None:
    """When the action may start; None while that is not known."""
    stage, kind, microbatch = action
    if kind == "F":
        return 0.0 if stage == 0 else finished.get((stage - 1, "F", microbatch))
    if kind == "W":
        return finished.get((stage, "I", microbatch))
    if stage == last:
        return finished.get((stage, "F", microbatch))
    return finished.get((stage + 1, "B", microbatch))


def peak(actions: Sequence[Action], kept: Sequence[Array], working: Sequence[Array]) -> Array:
    """The most that one rank holds at a time.

    Args:
        actions: the rank's own.
        kept: bytes that a micro-batch keeps of each stage from its forward to the end of
            its backward: numbers, or arrays of one shape, for example by rank of the EP group.
        working: bytes that a stage needs besides while it runs.
    """
    held: Array = 0.0
    most: Array = 0.0
    for stage, kind, _microbatch in actions:
        if kind == "F":
            held = held + kept[stage]
        most = np.maximum(most, held + working[stage])
        if kind in "BW":
            held = held - kept[stage]
    return most
