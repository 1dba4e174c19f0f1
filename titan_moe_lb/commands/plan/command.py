"""``titan-moe-lb plan``: from flags to a printed answer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from titan_moe_lb.commands.answer import page, plain_data, terminal
from titan_moe_lb.commands.plan import answer, arguments
from titan_moe_lb.commands.plan.arguments import Inputs
from titan_moe_lb.commands.plan.building import heartbeat, silent_build
from titan_moe_lb.commands.plan.clock import Clock
from titan_moe_lb.commands.plan.plan_arguments import PlanArguments
from titan_moe_lb.commands.plan.result import MEMORY_RESERVE, Plan
from titan_moe_lb.commands.plan.serving import answer as serving_answer
from titan_moe_lb.commands.plan.serving.command import serve
from titan_moe_lb.commands.plan.verdict import Verdict, judge
from titan_moe_lb.commands.plan.what_fits import Alternative, changes_of, what_fits
from titan_moe_lb.costmodel.hardware.device import Host
from titan_moe_lb.costmodel.times.job import JobModel
from titan_moe_lb.costmodel.times.predict import DegreePlan, heaviest_pipeline_ranks, plan_degree
from titan_moe_lb.errors import JobError
from titan_moe_lb.pages import output_file
from titan_moe_lb.traces.trace import trace_file

if TYPE_CHECKING:
    from titan_moe_lb.resolved_job import Job

IMBALANCES = "1.0,1.5,2.0,worst"


def run(flags: PlanArguments) -> None:
    """Plan the job and print the answer or its JSON; write a page if ``--output`` names one."""
    if flags.output:
        named = (flags.job_config, flags.hardware, flags.from_run)
        output_file.check(flags.output, [trace_file(path) for path in named if path])
    found = serving_answer.answer(serve(flags)) if flags.serve else answer.answer(make_plan(flags))
    if flags.output:  # before the answer, whose reader may close the pipe
        output_file.write(page.render(found), flags.output)
    if flags.json:
        print(plain_data.as_json(found))
    else:
        terminal.print_answer(found)
    if flags.output and not flags.json:
        print(f"\nPage: {flags.output}")


def make_plan(flags: PlanArguments) -> Plan:
    """Read the job, and the run if one is named, and plan every degree.

    Raises:
        JobError: a flag, the job or the run is wrong; the first error is reported.
    """
    from titan_moe_lb.costmodel.jobs.read_job import moe_layers_of

    inputs = Inputs.of(flags, IMBALANCES)
    usable = inputs.device.memory_bytes * (1 - MEMORY_RESERVE)
    with silent_build(), heartbeat("building one rank of each kind of pipeline position"):
        by_degree, own_degree = _jobs(inputs)
        moe_layers = moe_layers_of(next(iter(by_degree.values())).config.model_spec)
        # Check everything before the ranks are built, which takes minutes for a large model.
        loads, run = inputs.loads(moe_layers, by_degree)
        clock_degree = run["ep_degree"] if run else own_degree
        if flags.measured_step and clock_degree not in by_degree:
            raise JobError(
                f"--measured-step is the time at EP {clock_degree}, the degree of the "
                f"{'run' if run else 'job'}: add it to --ep"
            )
        jobs = _read_jobs(inputs, list(by_degree.values()))
    planned = functools.partial(
        plan_degree, hardware=inputs.derated, loads=loads, usable_bytes=usable
    )
    degrees = tuple(map(planned, sorted(jobs, key=lambda job: job.ep_degree)))
    verdict = judge(jobs[0], degrees, usable)
    of_run = [one for one in degrees if run and one.ep_degree == run["ep_degree"]]
    of_clock = [one for one in degrees if one.ep_degree == clock_degree]
    measured = flags.measured_step
    job_size = jobs[0].num_ranks, jobs[0].tokens_per_step
    if not measured and run and (run["ranks"], run["tokens_per_step"]) == job_size:
        measured = run["step_seconds"]
    return Plan(
        job=jobs[0],
        flags=flags,
        device=inputs.device,
        usable_bytes=usable,
        degrees=degrees,
        verdict=verdict,
        of_run=judge(jobs[0], of_run, usable) if of_run else None,
        clock=Clock.of(measured, judge(jobs[0], of_clock, usable))
        if measured and of_clock
        else None,
        alternatives=() if verdict.fits else _alternatives(inputs, verdict, jobs, planned, usable),
        run=run,
    )


def _jobs(inputs: Inputs) -> tuple[dict[int, Job], int | None]:
    """Resolve the job at every expert-parallel degree.

    Returns:
        Jobs by degree, and the job's own degree if it was looked for.
    """
    from titan_moe_lb.costmodel.jobs.read_job import moe_layers_of
    from titan_moe_lb.job import job_config

    draft = job_config.draft(inputs.flags.job_arguments)
    ranks = arguments.ranks(inputs.flags, draft.table.ranks)
    for degree in inputs.degrees:
        if degree > ranks:
            raise JobError(f"--ep {degree} is above the job's {ranks} rank(s)")
    degrees, own_degree = inputs.degrees, None
    if not degrees or (inputs.flags.measured_step and inputs.trace is None):
        job = _resolved(inputs.flags, ranks, [])
        own_degree = job.layout.ep
    if not degrees:
        layers = list(moe_layers_of(job.config.model_spec).values())
        degrees = arguments.usual_degrees(job.layout.ep, layers, job.layout.widest_ep)
        of_run = inputs.trace.info.ep if inputs.trace else degrees[0]
        if all(
            number % of_run == 0
            for number in (job.layout.widest_ep, *(one.num_experts for one in layers))
        ):
            degrees = list(dict.fromkeys([*degrees, of_run]))
    return {degree: _resolved(inputs.flags, ranks, [_ep(degree)]) for degree in degrees}, own_degree


def _ep(degree: int) -> str:
    return f"--parallelism.expert_parallel_degree={degree}"


def _resolved(flags: PlanArguments, ranks: int, more: list[str]) -> Job:
    """Resolve the job for its ranks, with further flags.

    A plan captures no CUDA graphs, and not every degree supports them.
    """
    from titan_moe_lb.job import job_config

    more = [*arguments.follows_ranks(flags), *more, "--training.disable_cuda_graphs"]
    job = job_config.load(arguments.with_flags(flags.job_arguments, more), ranks)
    if getattr(job.config.model_spec, "routing", None) is not None:
        raise JobError(
            "[model] routing runs a forward more a step, which plan does not count: plan the job "
            "with --model.routing none"
        )
    return job


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


def _alternatives(
    inputs: Inputs,
    verdict: Verdict,
    models: list[JobModel],
    planned: Callable[[JobModel], DegreePlan],
    usable: float,
) -> tuple[Alternative, ...]:
    """Search for jobs that fit at the fastest degree, if the job fits at none."""
    from titan_moe_lb.costmodel.jobs.read_job import read_job

    own = models[0].num_ranks

    def changed(ranks: int | None, more: list[str]) -> tuple[Verdict, int]:
        flags = dataclasses.replace(inputs.flags, ranks=ranks or inputs.flags.ranks)
        job = _resolved(flags, ranks or own, [_ep(verdict.ep_degree), *more])
        model = dataclasses.replace(
            read_job(job, on_host=isinstance(inputs.device, Host)), dispatcher=flags.dispatcher
        )
        return judge(model, [planned(model)], usable), model.tokens_per_step

    with silent_build(), heartbeat("looking for a job that fits"):
        job = _resolved(inputs.flags, own, [_ep(verdict.ep_degree)])
        return what_fits(changes_of(job, models[0]), changed)
