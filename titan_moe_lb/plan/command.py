"""From the arguments of ``titan-moe-lb plan`` to a plan."""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from titan_moe_lb.console.patience import Patience
from titan_moe_lb.costmodel.hardware import Hardware
from titan_moe_lb.costmodel.job import JobModel
from titan_moe_lb.costmodel.known_hardware import HOST, hardware
from titan_moe_lb.costmodel.load import TOLERANCE, WORST
from titan_moe_lb.costmodel.plan import heaviest_pipeline_ranks, plan_degree
from titan_moe_lb.errors import JobError
from titan_moe_lb.pages import output_file
from titan_moe_lb.plan import measured
from titan_moe_lb.plan.page import write_page
from titan_moe_lb.plan.plan import MEMORY_RESERVE, Plan
from titan_moe_lb.plan.question import Question
from titan_moe_lb.plan.table import print_plan
from titan_moe_lb.plan.verdict import judge
from titan_moe_lb.traces.trace import read_trace, trace_file

MOST_SIGMA = 5.0
DROP_SHARE = 0.01


def make_plan(question: Question) -> Plan:
    """Read the job, and the run if one is named, and plan every degree.

    Raises:
        JobError: the first thing that is wrong, in one line.
    """
    factors, sigmas = _imbalances(question.imbalance)
    if question.hot_experts < 1:
        raise JobError(f"--hot-experts {question.hot_experts} must be at least 1")
    for name in ("compute_efficiency", "network_efficiency"):
        share = getattr(question, name)
        if not 0 < share <= 1:
            raise JobError(
                f"--{name.replace('_', '-')} {share} must be above 0 and at most 1: it is a share"
            )
    if question.drop_share is not None and not 0 < question.drop_share < 1:
        raise JobError(f"--drop-share {question.drop_share} must be above 0 and below 1")
    for name, given in (
        ("redundant-experts", question.redundant_experts),
        ("drop-share", question.drop_share),
    ):
        if given is not None and question.from_run is None:
            raise JobError(f"--{name} is answered from the load of a run: give --from-run as well")
    device = hardware(question.hardware)
    derated = device.derated(
        compute_efficiency=question.compute_efficiency,
        network_efficiency=question.network_efficiency,
    )
    trace = read_trace(question.from_run, micro_batches=True) if question.from_run else None
    with (
        quiet_host(),
        Patience(
            lambda line: print(line, file=sys.stderr),
            lambda seconds: f"building one rank of each pipeline position: {seconds} s so far",
        ),
    ):
        jobs = _read_jobs(question, derated, factors)
    run, recorded = measured.of_run(trace, jobs[0]) if trace else (None, None)
    if question.drop_share is not None and recorded and not recorded.has_micro_batches:
        raise JobError(
            f"--drop-share: the trace in {question.from_run} has no loads of single micro-batches, "
            "which a capacity is for: take one that this version has written"
        )
    redundant = _redundant(question.redundant_experts, jobs[0], [job.ep_degree for job in jobs])
    usable = device.memory_bytes * (1 - MEMORY_RESERVE)
    degrees = tuple(
        plan_degree(
            job,
            derated,
            factors,
            num_hot_experts=question.hot_experts,
            usable_bytes=usable,
            sigmas=sigmas,
            recorded=recorded,
            redundant_experts=redundant,
            drop_share=question.drop_share or DROP_SHARE,
        )
        for job in sorted(jobs, key=lambda job: job.ep_degree)
    )
    return Plan(
        job=jobs[0],
        question=question,
        device=device,
        usable_bytes=usable,
        degrees=degrees,
        verdict=judge(jobs[0], degrees, usable, sigmas),
        run=run,
    )


def _imbalances(text: str) -> tuple[list[float], list[float]]:
    """Imbalances of the two-level load, and sigmas of log-normal ones."""
    factors: list[float] = []
    sigmas: list[float] = []
    for word in (word.strip() for word in text.split(",")):
        kind, colon, number = word.partition(":")
        try:
            if word == "worst":
                factors.append(WORST)
            elif colon and kind == "lognormal":
                sigmas.append(float(number))
            else:
                factors.append(float(word))
        except ValueError:
            raise JobError(
                f"--imbalance {text}: {word!r} is neither a number nor 'worst' nor lognormal:SIGMA"
            ) from None
    for factor in factors:
        if not (factor == WORST or factor >= 1):
            raise JobError(f"--imbalance {factor:g} is below 1, which is balance")
    for sigma in sigmas:
        if not 0 <= sigma <= MOST_SIGMA:
            raise JobError(
                f"--imbalance lognormal:{sigma:g} is outside [0, {MOST_SIGMA:g}]; recorded loads "
                "have 0.1 to 1.5"
            )
    return factors or [1.0], sigmas


def _redundant(text: str | None, job: JobModel, degrees: list[int]) -> list[int]:
    if text is None:
        return []
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise JobError(f"--redundant-experts {text} must be whole numbers of at least 1")
    numbers = list(dict.fromkeys(int(word) for word in words))
    for number in numbers:
        for degree in degrees:
            if number % degree:
                raise JobError(
                    f"--redundant-experts {number} is no multiple of EP {degree}: every rank "
                    "holds as many copies as the others"
                )
    return numbers


def _fit_model(question: Question, factors: list[float], job: JobModel) -> None:
    """Whether the model's layers can be as unbalanced as is asked."""
    for number, layer in job.moe_layers.items():
        if question.hot_experts > layer.top_k:
            raise JobError(
                f"--hot-experts {question.hot_experts} is above the {layer.top_k} experts that a "
                f"token takes in layer {number}: no more can be the most loaded at once"
            )
        worst = layer.num_experts / layer.top_k
        if max(factors) > worst * (1 + TOLERANCE):
            raise JobError(
                f"--imbalance {max(factors):g} is above {worst:g}, the worst of layer {number}, "
                f"where every token takes the same {layer.top_k} of {layer.num_experts} experts"
            )


def _degrees(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise JobError(f"--ep {text} must be whole numbers of at least 1, as in 8,16,32")
    return list(dict.fromkeys(int(word) for word in words))


def _read_jobs(question: Question, derated: Hardware, factors: list[float]) -> list[JobModel]:
    """The job at every degree, the first one with all of its pipeline ranks."""
    from titan_moe_lb.costmodel.read_job import read_job
    from titan_moe_lb.job import job_config
    from titan_moe_lb.parallel import layout

    draft = job_config.draft(question.job_arguments)
    ranks = _ranks(question, draft.table.ranks)
    os.environ["WORLD_SIZE"] = str(ranks)
    degrees = _degrees(question.ep) if question.ep else []
    for degree in degrees:
        if degree > ranks:
            raise JobError(f"--ep {degree} is above the job's {ranks} rank(s)")
    if not degrees:
        config = draft.resolve().config
        dims = layout.resolve(config.parallelism)
        degrees = _usual_degrees(config, dims.dp_shard * dims.cp * dims.tp)
    on_host = question.hardware == HOST
    jobs: list[JobModel] = []
    for degree in degrees:
        flags = [
            f"--parallelism.expert_parallel_degree={degree}",
            # Nothing is captured here, and not every degree could be.
            "--training.disable_cuda_graphs",
        ]
        config = job_config.load(_with_flags(question.job_arguments, flags)).config
        if not jobs:
            jobs.append(read_job(config, on_host=on_host))
            _fit_model(question, factors, jobs[0])
            heaviest = heaviest_pipeline_ranks(jobs[0], derated, question.hot_experts)
        else:
            jobs.append(
                read_job(config, pipeline_ranks=heaviest, stages=jobs[0].stages, on_host=on_host)
            )
    return [dataclasses.replace(job, dispatcher=question.dispatcher) for job in jobs]


def _with_flags(arguments: list[str], flags: list[str]) -> list[str]:
    """Behind the job's own, and before a subcommand as ``activation-checkpoint:full``."""
    subcommands = [n for n, word in enumerate(arguments) if word.startswith("activation-")]
    end = min(subcommands, default=len(arguments))
    return [*arguments[:end], *flags, *arguments[end:]]


def _ranks(question: Question, of_job: int | None) -> int:
    """The flag; else NGPU, as when the job is started; else what the job wants; else 1."""
    announced = os.environ.get("NGPU")
    if question.ranks is None and announced and not announced.isdecimal():
        raise JobError(f"NGPU={announced} must be a whole number of at least 1")
    ranks = int(announced or of_job or 1) if question.ranks is None else question.ranks
    if ranks < 1:
        raise JobError(f"--ranks {ranks} must be at least 1")
    return ranks


def _usual_degrees(config: Any, most: int) -> list[int]:
    """The job's own degree, then half and twice as often as the layout allows."""
    from torchtitan.models.common.moe import MoE

    experts = [moe.num_experts for _f, moe, _p, _a in config.traverse(MoE.Config)]
    own = config.parallelism.expert_parallel_degree
    possible = [
        2**power
        for power in range(most.bit_length())
        if most % 2**power == 0 and all(number % 2**power == 0 for number in experts)
    ]
    near = sorted((d for d in possible if d != own), key=lambda d: abs(np.log2(d / own)))
    return [own, *near[:4]]


@contextmanager
def quiet_host() -> Iterator[None]:
    """Ready for torchtitan, silent about the ranks that are built, and all put back after."""
    from titan_moe_lb.upstream import cpu

    cpu.prepare()
    world_size = os.environ.get("WORLD_SIZE")
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    # Copying pipeline stages makes millions of objects and no garbage: a quarter of the time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if collecting:
            gc.enable()
        logging.disable(level)
        if world_size is None:
            os.environ.pop("WORLD_SIZE", None)
        else:
            os.environ["WORLD_SIZE"] = world_size


def run(question: Question) -> None:
    """Answer on the terminal."""
    if question.output:
        named = (question.job_config, question.hardware, question.from_run)
        output_file.check(question.output, [trace_file(path) for path in named if path])
    plan = make_plan(question)
    if question.json:
        print(json.dumps(plan.as_json(), indent=2, default=str))
    else:
        print_plan(plan)
    if question.output:
        write_page(plan, question.output)
