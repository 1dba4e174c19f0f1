"""The time of one optimizer step: every stage's micro-batches, put in the schedule's order."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from titan_moe_lb.costmodel.hardware import Hardware
from titan_moe_lb.costmodel.job import JobModel
from titan_moe_lb.costmodel.layer import LayerTime
from titan_moe_lb.costmodel.makespan import makespan


def step_time(
    job: JobModel, hardware: Hardware, layer_times: Mapping[int, LayerTime], num_loads: int = 1
) -> float:
    """Seconds of one optimizer step.

    Dense layers take their FLOPs at the device's (derated) peak. FSDP's collectives and
    the sending between stages are taken to overlap, the optimizer to take no time.

    Args:
        layer_times: of each MoE layer, by its number in the whole model: numbers, or arrays
            ``(N,)`` under N loads that the micro-batches have in turn.
        num_loads: N.
    """
    forward, backward = [], []
    for stage in job.stages:
        tokens = job.tokens_per_microbatch
        dense = stage.dense_flops * tokens / job.tp_degree / hardware.bf16_flops
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
    return job.accumulation_steps * float(np.mean(passes))
