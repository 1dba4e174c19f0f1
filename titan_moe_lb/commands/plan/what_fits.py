"""Search for the nearest jobs that fit, where a job fits at no expert-parallel degree."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from titan_moe_lb.commands.plan.verdict import Verdict
from titan_moe_lb.costmodel.times.job import JobModel
from titan_moe_lb.errors import JobError
from titan_moe_lb.resolved_job import Job

TOGETHER = 2
"""Most changes that are tried at once."""


@dataclass(frozen=True)
class Change:
    """One change of a job that may make it fit."""

    name: str
    job_flags: tuple[str, ...] = ()
    ranks: int | None = None


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """Job that fits."""

    name: str
    flags: str
    """Flags of ``plan`` to add."""
    tokens_per_step: int
    verdict: Verdict


def changes_of(job: Job, model: JobModel) -> list[Change]:
    """List the changes that a person would try."""
    found = []
    if model.checkpointing != "full":
        found.append(Change("full checkpointing", ("--activation_checkpoint.type=full",)))
    rows, batch = job.config.training.local_batch_size, job.cut.global_batch_size
    if rows % 2 == 0:
        accumulated = (
            f"--training.local_batch_size={rows // 2}",
            f"--training.global_batch_size={batch}",
        )
        found.append(Change("half of the local batch, accumulated", accumulated))
    found.append(Change("twice the ranks", ranks=2 * model.num_ranks))
    if job.layout.pp > 1:
        own = job.config.parallelism.pipeline_parallel_schedule
        other = "ZBVZeroBubble" if own == "1F1B" else "1F1B"
        found.append(
            Change(f"schedule {other}", (f"--parallelism.pipeline_parallel_schedule={other}",))
        )
    return found


def what_fits(
    changes: Sequence[Change], planned: Callable[[int | None, list[str]], tuple[Verdict, int]]
) -> tuple[Alternative, ...]:
    """Plan the job with each change, and if none fits with several at once.

    ``planned`` takes the ranks, or None for those of the job, and further flags of the job. It
    returns the verdict and the tokens of a step. The jobs that fit are sorted by time per token.
    """
    for number in range(1, TOGETHER + 1):
        found = []
        for chosen in itertools.combinations(changes, number):
            ranks = next((change.ranks for change in chosen if change.ranks), None)
            flags = [flag for change in chosen for flag in change.job_flags]
            try:
                verdict, tokens = planned(ranks, flags)
            except JobError:  # the job is refused with this change
                continue
            if verdict.fits:
                words = [f"--ranks {ranks}"] * bool(ranks) + ["--"] * bool(flags)
                found.append(
                    Alternative(
                        name=" and ".join(change.name for change in chosen),
                        flags=" ".join([*words, *(flag.replace("=", " ", 1) for flag in flags)]),
                        tokens_per_step=tokens,
                        verdict=verdict,
                    )
                )
        if found:
            return tuple(sorted(found, key=lambda one: one.verdict.gpu_hours / one.tokens_per_step))
    return ()
