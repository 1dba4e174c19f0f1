"""``titan-moe-lb plan --serve``: from flags to the plan of a deployment."""

from __future__ import annotations

from typing import TYPE_CHECKING

from titan_moe_lb.commands.plan import arguments
from titan_moe_lb.commands.plan.arguments import Inputs
from titan_moe_lb.commands.plan.building import heartbeat, silent_build
from titan_moe_lb.commands.plan.plan_arguments import PlanArguments
from titan_moe_lb.commands.plan.result import MEMORY_RESERVE
from titan_moe_lb.commands.plan.serving.result import Serving
from titan_moe_lb.costmodel.times.served_load import ServedLoad, recorded_loads, two_level_loads
from titan_moe_lb.costmodel.times.serving import serve_degree
from titan_moe_lb.errors import JobError

if TYPE_CHECKING:
    from titan_moe_lb.resolved_job import Job

TOKENS = "1,8,64,512,4096"
CONTEXT = 4096
MOST_DEVICES = 2**20
ALONE = [
    "--parallelism.data_parallel_replicate_degree=1",
    "--parallelism.data_parallel_shard_degree=1",
    "--parallelism.context_parallel_degree=1",
    "--parallelism.tensor_parallel_degree=1",
    "--parallelism.pipeline_parallel_degree=1",
    "--parallelism.expert_parallel_degree=1",
    "--training.disable_cuda_graphs",
]
"""Flags for a job in one process, because a deployment ignores the training's layout."""


def serve(flags: PlanArguments) -> Serving:
    """Read the model, and the run if one is named, and plan every degree.

    Raises:
        JobError: a flag, the job or the run is wrong; the first error is reported.
    """
    from titan_moe_lb.costmodel.jobs.read_job import moe_layers_of
    from titan_moe_lb.costmodel.jobs.read_served import read_served

    inputs = Inputs.of(flags, "1.0")
    tokens = arguments.whole_numbers("--tokens", flags.tokens or TOKENS)
    context = CONTEXT if flags.context is None else flags.context
    if context < 1:
        raise JobError(f"--context {context} must be at least 1")
    with silent_build(), heartbeat("building the model"):
        job, degrees = _job(inputs)
        loads, run = inputs.loads(moe_layers_of(job.config.model_spec), degrees)
        model = read_served(job)
    layers = list(model.moe_layers.values())
    two_level = two_level_loads(layers, loads.factors, loads.num_hot_experts)
    log_normal = [
        ServedLoad(
            name=spread.name, description=spread.description, counts_NME=spread.loads(layers)
        )
        for spread in loads.spreads
    ]
    of_run = recorded_loads(loads.recorded, loads.redundant_experts) if loads.recorded else []
    usable = inputs.device.memory_bytes * (1 - MEMORY_RESERVE)
    return Serving(
        model=model,
        flags=flags,
        context=context,
        judged=(of_run or log_normal or two_level)[0],
        device=inputs.device,
        usable_bytes=usable,
        degrees=tuple(
            serve_degree(
                model,
                inputs.derated,
                ep_degree=degree,
                loads=two_level + log_normal + of_run,
                tokens=tokens,
                context=context,
                usable_bytes=usable,
                up_to_room=flags.tokens is None,
                dispatcher=flags.dispatcher,
            )
            for degree in sorted(degrees)
        ),
        run=run,
    )


def _job(inputs: Inputs) -> tuple[Job, list[int]]:
    """Resolve the job for one process, and the degrees to plan.

    ``--ep`` sets the degrees; by default they are the job's own and the powers of two near it.
    """
    from titan_moe_lb.costmodel.jobs.read_job import moe_layers_of
    from titan_moe_lb.job import job_config

    flags = inputs.flags.job_arguments
    degrees = inputs.degrees
    if not degrees:
        uncut = job_config.draft(flags).build()
        layers = list(moe_layers_of(uncut.model_spec).values())
        own = uncut.parallelism.expert_parallel_degree
        degrees = arguments.usual_degrees(own, layers, most=MOST_DEVICES)
    job = job_config.load(arguments.with_flags(flags, ALONE), 1)
    for degree in inputs.degrees:
        for number, layer in moe_layers_of(job.config.model_spec).items():
            if layer.num_experts % degree:
                raise JobError(
                    f"--ep {degree} does not divide the {layer.num_experts} experts of layer {number}"
                )
    return job, degrees
