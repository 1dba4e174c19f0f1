"""From the arguments of ``titan-moe-lb plan --serve`` to an answer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from titan_moe_lb.commands.plan import arguments, measured
from titan_moe_lb.commands.plan.building import heartbeat, silent_build
from titan_moe_lb.commands.plan.known_hardware import hardware
from titan_moe_lb.commands.plan.plan_arguments import PlanArguments
from titan_moe_lb.commands.plan.result import MEMORY_RESERVE
from titan_moe_lb.commands.plan.serving.answer import Serving
from titan_moe_lb.costmodel.times.layer import MoELayer
from titan_moe_lb.costmodel.times.served_load import drawn_loads, recorded_loads, two_level_loads
from titan_moe_lb.costmodel.times.serving import serve_degree
from titan_moe_lb.errors import JobError
from titan_moe_lb.traces.trace import read_trace

if TYPE_CHECKING:
    from torchtitan.trainer import Trainer

TOKENS = "1,8,64,512,4096"
CONTEXT = 4096
MOST_DEVICES = 2**20
ALONE = [
    *(
        f"--parallelism.{axis}_degree=1"
        for axis in (
            "data_parallel_replicate",
            "data_parallel_shard",
            "context_parallel",
            "tensor_parallel",
            "pipeline_parallel",
            "expert_parallel",
        )
    ),
    "--training.disable_cuda_graphs",
]
"""Flags of a job in one process: how its training is cut is nothing to a deployment."""


def serve(flags: PlanArguments) -> Serving:
    """Read the model, and the run if one is named, and plan every degree.

    Raises:
        JobError: the first thing that is wrong, in one line.
    """
    from titan_moe_lb.costmodel.jobs.read_job import moe_layers_of
    from titan_moe_lb.costmodel.jobs.read_served import read_served

    arguments.check(flags)
    factors, drawn = arguments.imbalances(flags.imbalance or "1.0")
    tokens = arguments.whole_numbers("--tokens", flags.tokens or TOKENS)
    context = CONTEXT if flags.context is None else flags.context
    if context < 1:
        raise JobError(f"--context {context} must be at least 1")
    device = hardware(flags.hardware)
    derated = device.derated(
        compute_efficiency=flags.compute_efficiency,
        network_efficiency=flags.network_efficiency,
    )
    trace = read_trace(flags.from_run) if flags.from_run else None
    with silent_build(), heartbeat("building the model"):
        config, degrees = _config(flags)
        moe_layers = moe_layers_of(config.model_spec)
        _check_degrees(flags, moe_layers)
        arguments.fit_model(flags, factors, moe_layers)
        run, recorded = measured.of_run(trace, moe_layers) if trace else (None, None)
        redundant = arguments.redundant(flags, degrees)
        model = read_served(config)
    layers = list(model.moe_layers.values())
    two_level = two_level_loads(layers, factors, flags.hot_experts)
    log_normal = drawn_loads(layers, arguments.spreads(drawn, layers))
    of_run = recorded_loads(recorded, redundant) if recorded else []
    usable = device.memory_bytes * (1 - MEMORY_RESERVE)
    return Serving(
        model=model,
        flags=flags,
        context=context,
        judged=(of_run or log_normal or two_level)[0],
        device=device,
        usable_bytes=usable,
        degrees=tuple(
            serve_degree(
                model,
                derated,
                ep_degree=degree,
                loads=two_level + log_normal + of_run,
                tokens=tokens,
                context=context,
                usable_bytes=usable,
                dispatcher=flags.dispatcher,
            )
            for degree in sorted(degrees)
        ),
        run=run,
    )


def _config(flags: PlanArguments) -> tuple[Trainer.Config, list[int]]:
    """The job, and the degrees: those asked for, or the job's own and those near it."""
    from titan_moe_lb.job import job_config

    degrees = arguments.degrees(flags)
    os.environ["WORLD_SIZE"] = "1"
    if not degrees:
        uncut = job_config.draft(flags.job_arguments).build()
        degrees = arguments.usual_degrees(uncut, most=MOST_DEVICES)
    job = arguments.with_flags(flags.job_arguments, ALONE)
    return job_config.load(job).config, degrees


def _check_degrees(flags: PlanArguments, moe_layers: Mapping[int, MoELayer]) -> None:
    for degree in arguments.degrees(flags):
        for number, layer in moe_layers.items():
            if layer.num_experts % degree:
                raise JobError(
                    f"--ep {degree} does not divide the {layer.num_experts} experts of layer {number}"
                )
