"""Checks of a job at config time, one function per rule.

Each rule takes a :class:`~titan_moe_lb.resolved_job.Job` and raises ``JobError`` with one line
that names the setting and what to use instead. No rule repeats a check that torchtitan makes when
the model is bound to the job. ``RULES`` run once in every process of a job, ``ON_THIS_MACHINE`` in
its launcher alone: a job may be resolved and printed on a machine where it cannot run.
"""

from __future__ import annotations

from collections.abc import Callable

from titan_moe_lb.resolved_job import Job
from titan_moe_lb.rules import (
    anticipatory,
    benchmark,
    checkpoint,
    hugging_face,
    job,
    losses,
    machine,
    model,
    pipeline,
    routers,
    spmd_backend,
)

RULES: tuple[Callable[[Job], None], ...] = (
    *job.RULES,
    *pipeline.RULES,
    *spmd_backend.RULES,
    *model.RULES,
    *routers.RULES,
    *losses.RULES,
    *benchmark.RULES,
    *anticipatory.RULES,
)

OF_A_MODEL: tuple[Callable[[Job], None], ...] = (
    *model.RULES,
    routers.routers_are_right,
    spmd_backend.blocks_can_be_traced,
)
"""Rules that read only ``parallelism``, ``compile``, ``activation_checkpoint`` and ``traverse``
of a config."""

ON_THIS_MACHINE: tuple[Callable[[Job], None], ...] = (
    *machine.RULES,
    *checkpoint.RULES,
    hugging_face.initial_weights_fit,
)
"""Rules of files, programs and devices, before any process starts."""


def validate(job: Job) -> None:
    """Run every rule.

    Raises:
        JobError: the first rule that does not hold.
    """
    for rule in RULES:
        rule(job)


def validate_here(job: Job) -> None:
    """Run every rule of this machine; raises as :func:`validate` does."""
    for rule in ON_THIS_MACHINE:
        rule(job)
