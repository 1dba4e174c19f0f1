"""The time of one optimizer step: every stage's micro-batches, put in the schedule's order."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from titan_moe_lb.costmodel.hardware.device import Hardware
from titan_moe_lb.costmodel.times.job import JobModel, Stage
from titan_moe_lb.costmodel.times.layer import LayerTime
from titan_moe_lb.costmodel.times.makespan import makespan


def step_time(
    job: JobModel, hardware: Hardware, layer_times: Mapping[int, LayerTime], num_loads: int = 1
) -> float:
    """Seconds of one optimizer step.

    Dense layers take their FLOPs at the device's (derated) peak, and what is done to their
    values one by one takes the memory's bandwidth. FSDP's collectives and the sending
    between stages are taken to overlap.

    Args:
        layer_times: of each MoE layer, by its number in the whole model: numbers, or arrays
            ``(N,)`` under N loads that the micro-batches have in turn.
        num_loads: N.
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
    """Seconds of one token outside MoE layers, forward.

    What linear layers take and give is written and read once more by the norms, rotations
    and sums between them. A logit is written in BF16, read, and written and read in float32.
    """
    elementwise = 2 * stage.dense_bytes + 12 * stage.vocabulary
    return stage.dense_flops / hardware.bf16_flops + elementwise / hardware.memory_bandwidth


def _optimizer_time(job: JobModel, hardware: Hardware) -> float:
    """Parameters and optimizer state read and written, gradients read, on the largest rank."""
    moved = max(
        2 * state.parameter_bytes + state.gradient_bytes + 2 * state.optimizer_bytes
        for state in job.states.values()
    )
    return moved / hardware.memory_bandwidth
