"""Last values and diagnosis of a run, without its counts."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from titan_moe_lb.commands.diagnose.checks import Diagnosis, diagnosis
from titan_moe_lb.commands.diagnose.window import FEWEST_STEPS, Window
from titan_moe_lb.traces.balance_statistics import max_violation, num_dead_experts
from titan_moe_lb.traces.run_info import RunInfo
from titan_moe_lb.traces.trace import Trace

EARLY = 60
"""Step before which no method has balanced a new model (docs/evidence/study.md)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExaminedRun:
    """One of several runs. Values are those of its last logged step."""

    path: Path
    info: RunInfo
    first_step: int
    last_step: int
    num_steps: int
    """Logged steps that were read."""
    is_sample: bool
    ended: bool
    damage: tuple[str, ...]
    loss: float
    """Last finite loss of the language model, over the global batch; NaN without one."""
    max_violation: float
    """Mean over the layers."""
    worst_layer: int
    worst_violation: float
    overload: float
    """Tokens of the most loaded rank over the balanced number; NaN if it was not logged."""
    dead_experts: int
    diagnosis: Diagnosis
    too_short: str
    """Sentence about a run with too few steps for a diagnosis; else empty."""

    @classmethod
    def of(cls, trace: Trace) -> ExaminedRun:
        """Examine the run of a trace."""
        loss_S = trace.over_steps("loss")
        finite_S = loss_S[np.isfinite(loss_S)]
        violation_M = max_violation(trace.counts_SME[-1])
        worst = int(violation_M.argmax())
        return cls(
            path=trace.path,
            info=trace.info,
            first_step=int(trace.steps[0]),
            last_step=int(trace.steps[-1]),
            num_steps=len(trace.steps),
            is_sample=trace.is_sample,
            ended=trace.ended,
            damage=trace.damage,
            loss=float(finite_S[-1]) if len(finite_S) else math.nan,
            max_violation=float(violation_M.mean()),
            worst_layer=trace.layers[worst],
            worst_violation=float(violation_M[worst]),
            overload=float(trace.over_steps("max_overload_factor")[-1]),
            dead_experts=int(num_dead_experts(trace.counts_SME[-1]).sum()),
            diagnosis=diagnosis(trace),
            too_short=_too_short(trace),
        )

    @property
    def steps(self) -> str:
        """First and last step, and their number, as a phrase."""
        steps = f"steps {self.first_step} to {self.last_step}"
        return f"{steps}, {self.num_steps} of them, evenly spread" if self.is_sample else steps

    @property
    def too_early(self) -> str:
        """Sentence about a run that no method can have balanced yet; else empty."""
        if self.last_step >= EARLY:
            return ""
        return (
            f"Before step {EARLY} uneven loads of a new model are expected: in "
            "docs/evidence/study.md a balance takes 60 to 300 steps."
        )

    @property
    def tokens_per_step(self) -> int:
        """Tokens of the global batch."""
        return self.info.global_batch_size * self.info.seq_len

    def plain_data(self) -> dict[str, Any]:
        """Return steps and diagnosis as plain data for JSON."""
        findings = [
            {**dataclasses.asdict(finding), "severity": finding.severity.name.lower()}
            for finding in self.diagnosis.findings
        ]
        return {
            "steps": self.num_steps,
            "is_sample": self.is_sample,
            "findings": findings,
            "well": self.diagnosis.well,
        }


def _too_short(trace: Trace) -> str:
    if Window(trace).is_long_enough:
        return ""
    changed = trace.info.balanced_since
    since = f" since the balancing changed at step {changed}" if changed else ""
    number = len(trace.steps) - trace.balanced_since
    return (
        f"{number} logged steps{since} are too few for a diagnosis: at least {FEWEST_STEPS} are "
        "needed."
    )
