"""Every rejection of a job, at config time, one function per rule.

What torchtitan says in one line is not said again here: the launcher binds a copy of the
model to the job before it starts a process, which makes torchtitan's checks.
Each rule takes a ``Trainer.Config`` and raises ``JobError`` with one line that
names the setting and what to use instead. The launcher runs them before it
starts a process, and the model config once more when torchtitan binds it.
:mod:`titan_moe_lb.rules.files` is not among the rules: a job can be resolved and
printed where it does not run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torchtitan.trainer import Trainer

from titan_moe_lb.rules import benchmark, job, losses, model, pipeline, routers, spmd_backend

RULES: tuple[Callable[[Trainer.Config], None], ...] = (
    *job.RULES,
    *pipeline.RULES,
    *spmd_backend.RULES,
    *model.RULES,
    *routers.RULES,
    *losses.RULES,
    *benchmark.RULES,
)

OF_A_MODEL: tuple[Callable[[Any], None], ...] = (
    *model.RULES,
    *routers.RULES,
    spmd_backend.blocks_can_be_traced,
)
"""Rules that ask a config for no more than its ``parallelism``, ``compile``,
``activation_checkpoint`` and ``traverse``."""


def validate(config: Trainer.Config) -> None:
    """Run every rule. Raises ``JobError`` at the first that does not hold."""
    for rule in RULES:
        rule(config)
