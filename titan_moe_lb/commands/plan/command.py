"""``titan-moe-lb plan``: from flags to a printed answer."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from titan_moe_lb.commands.answer import page, plain_data, terminal
from titan_moe_lb.commands.plan import answer, arguments
from titan_moe_lb.commands.plan.arguments import Inputs
from titan_moe_lb.commands.plan.building import heartbeat, silent_build
from titan_moe_lb.commands.plan.plan_arguments import PlanArguments
from titan_moe_lb.commands.plan.result import MEMORY_RESERVE, Plan
from titan_moe_lb.commands.plan.serving import answer as serving_answer
from titan_moe_lb.commands.plan.serving.command import serve
from titan_moe_lb.commands.plan.verdict import judge
from titan_moe_lb.costmodel.hardware.device import Host
from titan_moe_lb.costmodel.times.job import JobModel
from titan_moe_lb.costmodel.times.predict import heaviest_pipeline_ranks, plan_degree
from titan_moe_lb.errors import JobError
from titan_moe_lb.pages import output_file
from titan_moe_lb.traces.trace import trace_file

if TYPE_CHECKING:
    from titan_moe_lb.resolved_job import Job

IMBALANCES = "1.0,1.5,2.0,worst"
DROP_SHARE = 0.01


def run(flags: PlanArguments) -> None:
    """Plan the job and print the answer or its JSON; write a page if ``--output`` names one."""
    if flags.output:
        named = (flags.job_config, flags.hardware, flags.from_run)
        output_file.check(flags.output, [trace_file(path) for path in named if path])
    found = serving_answer.answer(serve(flags)) if flags.serve else answer.answer(make_plan(flags))
    if flags.json:
        print(plain_data.as_json(found))
    else:
        terminal.print_answer(found)
    if flags.output:
        output_file.write(page.render(found), flags.output)


def make_plan(flags: PlanArguments) -> Plan:
    """Read the job, and the run if one is named, and plan every degree.

    Raises:
        JobError: a flag, the job or the run is wrong; the first error is reported.
    """
    from titan_moe_lb.costmodel.jobs.read_job import moe_layers_of

    inputs = Inputs.of(flags, IMBALANCES)
    with silent_build(), heartbeat("building one rank of each kind of pipeline position"):
        by_degree = _jobs(inputs)
        moe_layers = moe_layers_of(next(iter(by_degree.values())).config.model_spec)
        # Check everything before the ranks are built, which takes minutes for a large model.
        loads = inputs.loads(moe_layers, by_degree)
        jobs = _read_jobs(inputs, list(by_degree.values()))
    usable = inputs.device.memory_bytes * (1 - MEMORY_RESERVE)
    degrees = tuple(
        plan_degree(
            job,
            inputs.derated,
            loads.factors,
            num_hot_experts=flags.hot_experts,
            usable_bytes=usable,
            spreads=loads.spreads,
            recorded=loads.recorded,
            redundant_experts=loads.redundant_experts,
            drop_share=flags.drop_share or DROP_SHARE,
        )
        for job in sorted(jobs, key=lambda job: job.ep_degree)
    )
    return Plan(
        job=jobs[0],
        flags=flags,
        device=inputs.device,
        usable_bytes=usable,
        degrees=degrees,
        verdict=judge(jobs[0], degrees, usable),
        run=loads.run,
    )


def _jobs(inputs: Inputs) -> dict[int, Job]:
    """Resolve the job at every expert-parallel degree."""
    from titan_moe_lb.costmodel.jobs.read_job import moe_layers_of
    from titan_moe_lb.job import job_config

    flags = inputs.flags.job_arguments
    draft = job_config.draft(flags)
    ranks = arguments.ranks(inputs.flags, draft.table.ranks)
    for degree in inputs.degrees:
        if degree > ranks:
            raise JobError(f"--ep {degree} is above the job's {ranks} rank(s)")
    degrees = inputs.degrees
    if not degrees:
        job = draft.resolve(ranks)
        layers = list(moe_layers_of(job.config.model_spec).values())
        degrees = arguments.usual_degrees(job.layout.ep, layers, job.layout.widest_ep)
    # A plan captures no CUDA graphs, and not every degree supports them.
    uncaptured = "--training.disable_cuda_graphs"
    return {
        degree: job_config.load(
            arguments.with_flags(
                flags, [f"--parallelism.expert_parallel_degree={degree}", uncaptured]
            ),
            ranks,
        )
        for degree in degrees
    }


def _read_jobs(inputs: Inputs, jobs: list[Job]) -> list[JobModel]:
    """Read the job at every degree.

    All pipeline ranks are read at the first degree, and only the heaviest ones at the others.
    """
    from titan_moe_lb.costmodel.jobs.read_job import read_job

    flags, on_host = inputs.flags, isinstance(inputs.device, Host)
    first = read_job(jobs[0], on_host=on_host)
    heaviest = heaviest_pipeline_ranks(first, inputs.derated, flags.hot_experts)
    others = [
        read_job(job, pipeline_ranks=heaviest, stages=first.stages, on_host=on_host)
        for job in jobs[1:]
    ]
    return [dataclasses.replace(job, dispatcher=flags.dispatcher) for job in (first, *others)]
