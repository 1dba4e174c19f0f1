"""From the arguments of ``titan-moe-lb plan`` to a plan."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from titan_moe_lb.commands.plan import arguments, measured, page
from titan_moe_lb.commands.plan.building import heartbeat, silent_build
from titan_moe_lb.commands.plan.known_hardware import HOST, hardware
from titan_moe_lb.commands.plan.plan_arguments import PlanArguments
from titan_moe_lb.commands.plan.result import MEMORY_RESERVE, Plan
from titan_moe_lb.commands.plan.serving import page as serving_page
from titan_moe_lb.commands.plan.serving.answer import Serving
from titan_moe_lb.commands.plan.serving.command import serve
from titan_moe_lb.commands.plan.serving.table import print_serving
from titan_moe_lb.commands.plan.table import print_plan
from titan_moe_lb.commands.plan.verdict import judge
from titan_moe_lb.costmodel.hardware.device import Hardware
from titan_moe_lb.costmodel.times.job import JobModel
from titan_moe_lb.costmodel.times.predict import heaviest_pipeline_ranks, plan_degree
from titan_moe_lb.errors import JobError
from titan_moe_lb.pages import output_file
from titan_moe_lb.traces.trace import read_trace, trace_file

if TYPE_CHECKING:
    from torchtitan.trainer import Trainer

IMBALANCES = "1.0,1.5,2.0,worst"
DROP_SHARE = 0.01

Answer = TypeVar("Answer", Plan, Serving)


def make_plan(flags: PlanArguments) -> Plan:
    """Read the job, and the run if one is named, and plan every degree.

    Raises:
        JobError: the first thing that is wrong, in one line.
    """
    from titan_moe_lb.costmodel.jobs.read_job import moe_layers_of

    arguments.check(flags)
    factors, drawn = arguments.imbalances(flags.imbalance or IMBALANCES)
    device = hardware(flags.hardware)
    derated = device.derated(
        compute_efficiency=flags.compute_efficiency,
        network_efficiency=flags.network_efficiency,
    )
    trace = read_trace(flags.from_run, micro_batches=True) if flags.from_run else None
    if flags.drop_share is not None and trace and not len(trace.micro_batch_counts_SME):
        raise JobError(
            f"--drop-share: the trace in {flags.from_run} has no loads of single micro-batches, "
            "which a capacity is for: take one that this version has written"
        )
    with silent_build(), heartbeat("building one rank of each pipeline position"):
        configs = _configs(flags)
        moe_layers = moe_layers_of(next(iter(configs.values())).model_spec)
        # Everything is checked before ranks are built, which takes minutes for a large model.
        arguments.fit_model(flags, factors, moe_layers)
        spreads = arguments.spreads(drawn, list(moe_layers.values()))
        redundant = arguments.redundant(flags, list(configs))
        run, recorded = measured.of_run(trace, moe_layers) if trace else (None, None)
        jobs = _read_jobs(flags, derated, list(configs.values()))
    usable = device.memory_bytes * (1 - MEMORY_RESERVE)
    degrees = tuple(
        plan_degree(
            job,
            derated,
            factors,
            num_hot_experts=flags.hot_experts,
            usable_bytes=usable,
            spreads=spreads,
            recorded=recorded,
            redundant_experts=redundant,
            drop_share=flags.drop_share or DROP_SHARE,
        )
        for job in sorted(jobs, key=lambda job: job.ep_degree)
    )
    return Plan(
        job=jobs[0],
        flags=flags,
        device=device,
        usable_bytes=usable,
        degrees=degrees,
        verdict=judge(jobs[0], degrees, usable),
        run=run,
    )


def _configs(flags: PlanArguments) -> dict[int, Trainer.Config]:
    """The job, resolved at every expert-parallel degree."""
    from titan_moe_lb.job import job_config
    from titan_moe_lb.parallel import layout

    draft = job_config.draft(flags.job_arguments)
    ranks = arguments.ranks(flags, draft.table.ranks)
    os.environ["WORLD_SIZE"] = str(ranks)
    degrees = arguments.degrees(flags)
    for degree in degrees:
        if degree > ranks:
            raise JobError(f"--ep {degree} is above the job's {ranks} rank(s)")
    if not degrees:
        config = draft.resolve().config
        dims = layout.resolve(config.parallelism)
        degrees = arguments.usual_degrees(config, dims.dp_shard * dims.cp * dims.tp)
    # Nothing is captured here, and not every degree could be.
    uncaptured = "--training.disable_cuda_graphs"
    return {
        degree: job_config.load(
            arguments.with_flags(
                flags.job_arguments,
                [f"--parallelism.expert_parallel_degree={degree}", uncaptured],
            )
        ).config
        for degree in degrees
    }


def _read_jobs(
    flags: PlanArguments, derated: Hardware, configs: list[Trainer.Config]
) -> list[JobModel]:
    """The job at every degree, the first one with all of its pipeline ranks."""
    from titan_moe_lb.costmodel.jobs.read_job import read_job

    on_host = flags.hardware == HOST
    first = read_job(configs[0], on_host=on_host)
    heaviest = heaviest_pipeline_ranks(first, derated, flags.hot_experts)
    others = [
        read_job(config, pipeline_ranks=heaviest, stages=first.stages, on_host=on_host)
        for config in configs[1:]
    ]
    return [dataclasses.replace(job, dispatcher=flags.dispatcher) for job in (first, *others)]


def run(flags: PlanArguments) -> None:
    """Answer on the terminal, and on a page where one is asked for."""
    if flags.output:
        named = (flags.job_config, flags.hardware, flags.from_run)
        output_file.check(flags.output, [trace_file(path) for path in named if path])
    if flags.serve:
        serving = serve(flags)
        _show(flags, serving, print_serving, serving_page.render)
    else:
        _show(flags, make_plan(flags), print_plan, page.render)


def _show(
    flags: PlanArguments,
    answer: Answer,
    print_answer: Callable[[Answer], None],
    render: Callable[[Answer], str],
) -> None:
    if flags.json:
        print(json.dumps(answer.as_json(), indent=2, default=str))
    else:
        print_answer(answer)
    if flags.output:
        output_file.write(render(answer), flags.output)
