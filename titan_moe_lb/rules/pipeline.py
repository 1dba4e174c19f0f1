"""Rules of pipeline schedules.

torch and torchtitan raise these errors too, but only after every process has built its model.
:mod:`titan_moe_lb.rules.losses` refuses losses of a whole batch, which a pipeline cuts.
"""

from __future__ import annotations

import itertools

from titan_moe_lb.errors import JobError, nearest
from titan_moe_lb.parallel.schedules import SCHEDULES
from titan_moe_lb.resolved_job import Job
from titan_moe_lb.upstream.pipeline_stages import all_modules, modules_of_stages

_A_STAGE_A_RANK = ("1F1B", "GPipe")
_TWO_STAGES_A_RANK = ("ZBVZeroBubble", "DualPipeV")
_A_MICRO_BATCH_A_STAGE = ("1F1B", "DualPipeV")
_EQUAL_ROUNDS = ("Interleaved1F1B", "InterleavedZeroBubble")


def schedule_is_known(job: Job) -> None:
    """Check that the schedule exists.

    torch ignores the case of its name; the rules here and in zero_bubble.py do not.
    """
    schedule = job.config.parallelism.pipeline_parallel_schedule
    if job.config.parallelism.pipeline_parallel_degree > 1 and schedule not in SCHEDULES:
        same = [name for name in SCHEDULES if name.lower() == schedule.lower()]
        raise JobError(
            f"parallelism.pipeline_parallel_schedule {schedule!r} does not exist; "
            f"{nearest(same[0] if same else schedule, SCHEDULES)}"
        )


def stages_fit_ranks(job: Job) -> None:
    """Check that the number of stages fits the schedule and the ranks."""
    parallelism, stages = job.config.parallelism, len(_stages(job))
    schedule, ranks = parallelism.pipeline_parallel_schedule, job.layout.pp
    wanted = 1 if schedule in _A_STAGE_A_RANK else 2 if schedule in _TWO_STAGES_A_RANK else 0
    if parallelism.pipeline_parallel_schedule_csv:
        wanted = 0
    if not stages or (stages == wanted * ranks if wanted else stages % ranks == 0):
        return
    by_hand = parallelism.module_fqns_per_model_part is not None
    key = "module_fqns_per_model_part" if by_hand else "pipeline_parallel_layers_per_stage"
    needs = f"{wanted * ranks} stages" if wanted else "as many stages on each rank"
    raise JobError(
        f"parallelism.{key} makes {stages} stages; the {schedule} schedule needs {needs} with "
        f"parallelism.pipeline_parallel_degree {ranks}"
    )


def micro_batches_fit_schedule(job: Job) -> None:
    """Check the number of micro-batches, as in torch 2.14, ``distributed/pipelining/schedules.py``."""
    parallelism, stages = job.config.parallelism, len(_stages(job))
    if not stages or parallelism.pipeline_parallel_schedule_csv:
        return
    schedule, ranks = parallelism.pipeline_parallel_schedule, job.layout.pp
    size = parallelism.pipeline_parallel_microbatch_size
    number = job.config.training.local_batch_size // size
    if schedule in _A_MICRO_BATCH_A_STAGE and number < stages:
        needs, enough = f"a micro-batch for each of {stages} stages", stages
    elif schedule in _EQUAL_ROUNDS and number % max(1, number // ranks):
        needs, enough = f"a multiple of {ranks} micro-batches", (number // ranks + 1) * ranks
    else:
        return
    raise JobError(
        f"the {schedule} schedule needs {needs}, and training.local_batch_size "
        f"{job.config.training.local_batch_size} makes {number} of "
        f"parallelism.pipeline_parallel_microbatch_size {size}: set training.local_batch_size to "
        f"{enough * size}"
    )


def stages_have_attention(job: Job) -> None:
    """Check that every stage has a layer, under context parallelism.

    Upstream fact: torchtitan 0.3.0's ``apply_cp_to_forward`` reads the first attention of a stage.
    """
    parallelism, stages = job.config.parallelism, _stages(job)
    if parallelism.context_parallel_degree == 1:
        return
    for number, names in enumerate(stages):
        if any(name.startswith("layers.") for name in names):
            continue
        remedy = "give it one"
        if parallelism.module_fqns_per_model_part is None:
            end = "first" if number == 0 else "last"
            remedy = f"set parallelism.pipeline_parallel_{end}_stage_less_layers to 0"
        raise JobError(
            f"stage {number + 1} of {len(stages)} of the pipeline has no layer, which torchtitan "
            f"0.3.0 cannot cut for parallelism.context_parallel_degree "
            f"{parallelism.context_parallel_degree}: {remedy}"
        )


def _stages(job: Job) -> list[list[str]]:
    """Return the names of the modules of each stage; empty without a pipeline."""
    parallelism, spec, ranks = job.config.parallelism, job.config.model_spec, job.layout.pp
    if ranks == 1 or spec is None:
        return []
    if spec.pipelining_fn is None:
        raise JobError(
            f"parallelism.pipeline_parallel_degree is {ranks}, and torchtitan has no pipeline "
            f"for {spec.name}: set it to 1"
        )
    if parallelism.module_fqns_per_model_part is not None:
        return _by_hand(parallelism.module_fqns_per_model_part, len(spec.model.layers))
    try:
        return modules_of_stages(job.layout, parallelism, spec.model)
    except ValueError as error:
        raise JobError(f"parallelism: {' '.join(str(error).split())}") from None


def _by_hand(stages: list[list[str]], num_layers: int) -> list[list[str]]:
    """Check the user's own stages; torchtitan drops modules that no stage names."""
    key = "parallelism.module_fqns_per_model_part"
    modules = all_modules(num_layers)
    places: dict[str, int] = {}
    for number, names in enumerate(stages, start=1):
        for name in names:
            if name not in modules:
                raise JobError(f"{key} names {name!r}; {nearest(name, modules)}")
            if name in places:
                raise JobError(f"{key} names {name!r} twice")
            places[name] = number
    for name in modules:
        if name not in places:
            raise JobError(f"{key} leaves {name!r} out: assign it to a stage")
    for before, after in itertools.pairwise(modules):
        if places[before] > places[after]:
            raise JobError(
                f"{key} has {after!r} in stage {places[after]} and {before!r}, which comes before "
                f"it, in stage {places[before]}: give them in the model's order"
            )
    return stages


RULES = (
    schedule_is_known,
    stages_fit_ranks,
    micro_batches_fit_schedule,
    stages_have_attention,
)
