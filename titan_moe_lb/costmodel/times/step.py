"""Time of one optimizer step, from the micro-batches of every stage in schedule order."""

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
    """Time of one optimizer step, in seconds.

    Dense matrix products run at the device's derated peak, elementwise operations at its memory
    bandwidth. FSDP's collectives and the sends between stages are assumed to overlap with
    compute.

    Args:
        job: sizes and schedule of the job.
        hardware: the derated device.
        layer_times: time of each MoE layer, by its number in the whole model: numbers, or arrays
            ``(N,)`` for N loads that the micro-batches cycle through.
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
