"""Result of ``titan-moe-lb plan``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from titan_moe_lb.commands.plan.clock import Clock
from titan_moe_lb.commands.plan.plan_arguments import PlanArguments
from titan_moe_lb.commands.plan.verdict import Verdict
from titan_moe_lb.commands.plan.what_fits import Alternative
from titan_moe_lb.costmodel.hardware.device import Hardware
from titan_moe_lb.costmodel.times.job import JobModel
from titan_moe_lb.costmodel.times.predict import DegreePlan

MEMORY_RESERVE = 0.1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Plan of a job at every expert-parallel degree."""

    job: JobModel
    """Sizes of the job at the first degree."""
    flags: PlanArguments
    device: Hardware
    """Device with its peaks, not derated."""
    usable_bytes: float
    degrees: tuple[DegreePlan, ...]
    verdict: Verdict
    of_run: Verdict | None
    """Verdict on the run's own degree; None without a run, or if that degree is not planned."""
    clock: Clock | None
    """Measured step beside the predicted one; None if no step was measured."""
    alternatives: tuple[Alternative, ...]
    """Jobs that fit; empty if the job itself fits."""
    run: dict[str, Any] | None
    """Facts of the run that the measured rows use; None without a run."""

    def as_json(self) -> dict[str, Any]:
        """Convert to plain data in seconds, bytes and tokens."""
        first = next(iter(self.job.moe_layers.values()))
        return {
            "verdict": dataclasses.asdict(self.verdict),
            "verdict_of_run": self.of_run and dataclasses.asdict(self.of_run),
            "clock": self.clock and dataclasses.asdict(self.clock),
            "alternatives": [dataclasses.asdict(one) for one in self.alternatives],
            "job": {
                "model": self.job.model_name,
                "flavor": self.job.flavor,
                "ranks": self.job.num_ranks,
                "moe_layers": list(self.job.moe_layers),
                **dataclasses.asdict(first),
                "checkpointing": self.job.checkpointing,
                "steps": self.job.steps,
            },
            "states": [dataclasses.asdict(state) for state in self.job.states.values()],
            "hardware": dataclasses.asdict(self.device),
            "usable_memory_bytes": self.usable_bytes,
            "assumptions": self.flags.assumptions,
            "degrees": [dataclasses.asdict(degree) for degree in self.degrees],
            "run": self.run,
        }
