"""Time of one optimizer step, from the micro-batches of every stage in schedule order."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from titan_moe_lb.costmodel.hardware.device import Hardware
from titan_moe_lb.costmodel.times.job import JobModel, Stage
from titan_moe_lb.costmodel.times.layer import LayerTime
from titan_moe_lb.parallel.schedules import Action, Schedule


def step_time(
    job: JobModel, hardware: Hardware, layer_times: Mapping[int, LayerTime], num_loads: int = 1
) -> float:
    """Time of one optimizer step, in seconds.

    Dense matrix products run at the device's derated peak, elementwise operations at its memory
    bandwidth. FSDP's collectives and the sends between stages are assumed to overlap with compute.
    The times of a layer are numbers, or arrays ``(N,)`` for N loads that the micro-batches cycle
    through.
    """
    forward, backward = [], []
    for stage in job.stages:
        tokens = job.tokens_per_microbatch
        dense = tokens / job.tp_degree * _dense_time(stage, hardware)
        repeated = {"full": 1.0, "selective": 0.5, "none": 0.0}[job.checkpointing] * dense
        moe = [layer_times[number] for number in stage.moe_layers]
        ahead = dense + sum(time.forward for time in moe)
        back = (
            2 * dense
            + repeated
            + sum(time.backward + time.recomputation(job.checkpointing) for time in moe)
        )
        forward.append(np.broadcast_to(ahead, num_loads))
        backward.append(np.broadcast_to(back, num_loads))
    passes = [
        makespan(job.schedule, np.stack(forward)[:, loads], np.stack(backward)[:, loads])
        for loads in job.in_turn(num_loads)
    ]
    return job.accumulation_steps * float(np.mean(passes)) + _optimizer_time(job, hardware)


def _dense_time(stage: Stage, hardware: Hardware) -> float:
    """Forward time of one token outside MoE layers, in seconds.

    Norms, rotations and sums between linear layers write and read the layers' inputs and
    results once more. A logit is written in BF16, read, then written and read in float32.
    """
    elementwise = 2 * stage.dense_bytes + 12 * stage.vocabulary
    return stage.dense_flops / hardware.bf16_flops + elementwise / hardware.memory_bandwidth


def _optimizer_time(job: JobModel, hardware: Hardware) -> float:
    """Optimizer time on the largest rank, in seconds.

    The optimizer reads and writes parameters and its state, and reads gradients.
    """
    moved = max(
        2 * state.parameter_bytes + state.gradient_bytes + 2 * state.optimizer_bytes
        for state in job.states.values()
    )
    return moved / hardware.memory_bandwidth


def makespan(schedule: Schedule, forward: ArrayLike, backward: ArrayLike) -> float:
    """Time from the first forward to the last backward, in seconds.

    A forward waits for the previous stage's forward, a backward for the next stage's backward. A
    rank runs one action at a time, and sends take no time. A split backward spends half its time
    on the inputs and half on the weights. Times are of each stage ``(stages,)``, or of each stage
    and micro-batch ``(stages, micro-batches)``.
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
