"""From the arguments of ``titan-moe-lb plan`` to a plan."""

from __future__ import annotations

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
from titan_moe_lb.costmodel.known_hardware import hardware
from titan_moe_lb.costmodel.load import TOLERANCE, WORST
from titan_moe_lb.costmodel.plan import heaviest_pipeline_ranks, plan_degree
from titan_moe_lb.errors import JobError
from titan_moe_lb.pages import output_file
from titan_moe_lb.plan.page import write_page
from titan_moe_lb.plan.plan import MEMORY_RESERVE, Plan
from titan_moe_lb.plan.question import Question
from titan_moe_lb.plan.table import print_plan
from titan_moe_lb.traces.trace import Trace, read_trace, trace_file


def make_plan(question: Question) -> Plan:
    """Read the job, and the run if one is named, and plan every degree.

    Raises:
        JobError: the first thing that is wrong, in one line.
    """
    factors = _imbalances(question.imbalance)
    if question.hot_experts < 1:
        raise JobError(f"--hot-experts {question.hot_experts} must be at least 1")
    for name in ("compute_efficiency", "network_efficiency"):
        share = getattr(question, name)
        if not 0 < share <= 1:
            raise JobError(
                f"--{name.replace('_', '-')} {share} must be above 0 and at most 1: it is a share"
            )
    device = hardware(question.hardware)
    derated = device.derated(
        compute_efficiency=question.compute_efficiency,
        network_efficiency=question.network_efficiency,
    )
    trace = read_trace(question.from_run) if question.from_run else None
    with (
        quiet_host(),
        Patience(
            lambda line: print(line, file=sys.stderr),
            lambda seconds: f"building one rank of each pipeline position: {seconds} s so far",
        ),
    ):
        jobs = _read_jobs(question, derated, factors)
    run, first, last = _measured(trace, jobs[0]) if trace else (None, None, None)
    usable = device.memory_bytes * (1 - MEMORY_RESERVE)
    return Plan(
        job=jobs[0],
        question=question,
        device=device,
        usable_bytes=usable,
        degrees=tuple(
            plan_degree(
                job,
                derated,
                factors,
                num_hot_experts=question.hot_experts,
                usable_bytes=usable,
                first_counts_ME=first,
                last_counts_ME=last,
            )
            for job in sorted(jobs, key=lambda job: job.ep_degree)
        ),
        run=run,
    )


def _imbalances(text: str) -> list[float]:
    factors = []
    for word in text.split(","):
        if word.strip() == "worst":
            factors.append(WORST)
            continue
        try:
            factors.append(float(word))
        except ValueError:
            raise JobError(
                f"--imbalance {text}: {word.strip()!r} is neither a number nor 'worst'"
            ) from None
        if not factors[-1] >= 1:
            raise JobError(f"--imbalance {word.strip()} is below 1, which is balance")
    return factors


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
    jobs: list[JobModel] = []
    for degree in degrees:
        flags = [
            *question.job_arguments,
            f"--parallelism.expert_parallel_degree={degree}",
            # Nothing is captured here, and not every degree could be.
            "--training.disable_cuda_graphs",
        ]
        config = job_config.load(flags).config
        if not jobs:
            jobs.append(read_job(config))
            _fit_model(question, factors, jobs[0])
            heaviest = heaviest_pipeline_ranks(jobs[0], derated, question.hot_experts)
        else:
            jobs.append(read_job(config, pipeline_ranks=heaviest, stages=jobs[0].stages))
    return jobs


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


def _measured(trace: Trace, job: JobModel) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """What the run is, and its counts at its first and at its last steps."""
    layer = next(iter(job.moe_layers.values()))
    mine = (job.model_name, job.flavor, layer.num_experts, layer.top_k, tuple(job.moe_layers))
    info = trace.info
    if (info.model, info.flavor, info.num_experts, info.top_k, info.layers) != mine:
        raise JobError(
            f"--from-run {trace.path.parent} is of {info.model_name}, the job is {job.model_name} {job.flavor} "
            f"({len(job.moe_layers)} MoE layers, {layer.num_experts} experts, top {layer.top_k}): "
            "take a run of the job's model"
        )
    window = max(1, len(trace.steps) // 10)
    counts = trace.counts_SME
    run = {
        "path": str(trace.path.parent),
        "layout": info.layout,
        "losses": info.losses,
        "expert_bias": info.expert_bias,
        "first_steps": trace.steps[:window].tolist(),
        "last_steps": trace.steps[-window:].tolist(),
        "ep_degree": info.ep,
        # Of single micro-batches; the counts are of whole global batches.
        "max_overload_factor": float(np.nanmax(trace.over_steps("max_overload_factor"))),
    }
    return run, counts[:window].sum(axis=0), counts[-window:].sum(axis=0)


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
