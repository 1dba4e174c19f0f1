"""How long a pipeline schedule takes."""

from __future__ import annotations

from collections.abc import Sequence

from titan_moe_lb.parallel.schedules import Action, Schedule


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
