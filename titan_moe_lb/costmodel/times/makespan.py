"""Time of a pipeline schedule."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from titan_moe_lb.parallel.schedules import Action, Schedule


def makespan(schedule: Schedule, forward: ArrayLike, backward: ArrayLike) -> float:
    """Time from the first forward to the last backward, in seconds.

    A forward waits for the previous stage's forward, a backward for the next stage's backward.
    A rank runs one action at a time, and sends take no time. A split backward spends half its
    time on the inputs and half on the weights.

    Args:
        schedule: actions of each pipeline rank, in order.
        forward: seconds of each stage ``(stages,)``, or of each stage and micro-batch
            ``(stages, micro-batches)``.
        backward: seconds of each stage's backward, with the shape of ``forward``.
    """
    number = 1 + max(action[2] for actions in schedule.values() for action in actions)
    ahead, back = (_table(seconds, number) for seconds in (forward, backward))
    last = len(ahead) - 1
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
                seconds = (ahead if kind == "F" else back)[stage][microbatch]
                clock[rank] = max(clock[rank], needs) + seconds * (0.5 if kind in "IW" else 1.0)
                finished[action] = clock[rank]
                if kind == "I":
                    finished[stage, "B", microbatch] = clock[rank]
                position[rank] += 1
                waiting -= 1
        assert waiting < before, "the schedule waits for itself"
    return max(clock.values())


def _table(seconds: ArrayLike, num_micro_batches: int) -> list[list[float]]:
    by_stage = np.asarray(seconds, dtype=np.float64)
    by_stage = by_stage.reshape(len(by_stage), -1)
    return np.broadcast_to(by_stage, (len(by_stage), num_micro_batches)).tolist()


def _predecessor(action: Action, last: int, finished: dict[Action, float]) -> float | None:
    """Earliest start of an action in seconds; None until its predecessor has run."""
    stage, kind, microbatch = action
    if kind == "F":
        return 0.0 if stage == 0 else finished.get((stage - 1, "F", microbatch))
    if kind == "W":
        return finished.get((stage, "I", microbatch))
    if stage == last:
        return finished.get((stage, "F", microbatch))
    return finished.get((stage + 1, "B", microbatch))
