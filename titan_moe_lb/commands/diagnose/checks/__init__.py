"""Checks of the balance of a run, and the findings that explain others.

A check is a function of the window at the end of a run, and an entry of :data:`CHECKS`. It returns
a finding, or a sentence with numbers that are in bounds, or None if it does not apply.

Shape suffixes: S = steps of the window, M = MoE layers, E = experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from titan_moe_lb.commands.diagnose.checks import (
    bias,
    frozen,
    gradients,
    loads,
    losses,
    ranks,
    run,
    scores,
)
from titan_moe_lb.commands.diagnose.finding import Finding, Severity
from titan_moe_lb.commands.diagnose.window import Window
from titan_moe_lb.traces.trace import Trace


@dataclass(frozen=True, slots=True)
class Check:
    """Check function, with its topic and the findings that it explains."""

    look: Callable[[Window], Finding | str | None]
    topic: str = ""
    explains: tuple[str, ...] = ()
    """Topics and kinds of the findings that follow from its finding."""

    @property
    def kind(self) -> str:
        """Kind of its finding: the name of the function."""
        return self.look.__name__


CHECKS = (
    Check(run.diverged, explains=("method", "loads")),
    Check(run.forced_routing, explains=("nothing_balances", "method", "loads", "micro-batches")),
    Check(losses.nothing_balances, explains=("loads",)),
    Check(bias.bias_too_slow, "method", explains=("too_weak", "loads")),
    Check(bias.bias_oscillates, "method", explains=("bias_saturates", "too_weak", "loads")),
    Check(bias.bias_saturates, "method", explains=("too_weak", "loads")),
    Check(gradients.loss_without_gradient, explains=("too_weak", "loads")),
    Check(gradients.aux_loss_too_weak, explains=("too_weak", "loads")),
    Check(gradients.aux_loss_dominates),
    Check(frozen.frozen_part_drifts),
    Check(scores.logits_grow, explains=("one_expert_decides",)),
    Check(scores.one_expert_decides),
    Check(losses.too_weak, "method", explains=("loads",)),
    Check(
        loads.collapse, "loads", explains=("dead_experts", "hot_expert", "hot_rank", "first_layers")
    ),
    Check(loads.dead_experts, "loads"),
    Check(loads.hot_expert, "loads", explains=("hot_rank", "first_layers")),
    Check(ranks.hot_rank, "loads"),
    Check(ranks.hidden_in_micro_batches, "micro-batches"),
    Check(loads.first_layers, "loads"),
    Check(scores.bfloat16_flips),
    Check(run.padding),
)
"""All checks. A cause is before its symptoms; findings of one severity are listed in this order."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Result of all checks on the end of a run."""

    findings: list[Finding]
    """A finding for each cause, the worst first."""
    well: dict[str, str]
    """Kind to numbers of each check without a finding."""


def diagnosis(trace: Trace) -> Diagnosis:
    """Run all checks on the end of a run; none if it is not :attr:`Window.is_long_enough`.

    A finding that another one explains is a symptom: it is listed in ``explains`` of its cause. A
    cause gets the highest severity of its symptoms, unless it is a note.
    """
    window, well = Window(trace), dict[str, str]()
    if not window.is_long_enough:
        return Diagnosis([], well)
    causes: list[tuple[Check, Finding, list[Finding]]] = []
    for check in CHECKS:
        seen = check.look(window)
        if isinstance(seen, str):
            well[check.kind] = seen
        elif seen is not None:
            finding = replace(seen, kind=check.kind)
            explained = [
                symptoms for one, cause, symptoms in causes if _explains(one, cause, check, finding)
            ]
            for symptoms in explained:
                symptoms.append(finding)
            if not explained:
                causes.append((check, finding, []))
    listed = [_with_symptoms(finding, symptoms) for _check, finding, symptoms in causes]
    return Diagnosis(sorted(listed, key=lambda finding: -finding.severity), well)


def _with_symptoms(cause: Finding, symptoms: list[Finding]) -> Finding:
    severity = cause.severity
    if severity is not Severity.NOTE:
        severity = max([severity, *(symptom.severity for symptom in symptoms)])
    explains = {symptom.kind: symptom.what for symptom in symptoms}
    return replace(cause, severity=severity, explains=explains)


def findings(trace: Trace) -> list[Finding]:
    """Return only the findings of :func:`diagnosis`."""
    return diagnosis(trace).findings


def _explains(cause: Check, finding: Finding, check: Check, symptom: Finding) -> bool:
    """Return True if a cause explains a symptom.

    Its check declares so, the cause began no later, and it affects all layers of the symptom.
    """
    if not {check.kind, check.topic} & {*cause.explains}:
        return False
    if finding.since is not None and symptom.since is not None and finding.since > symptom.since:
        return False
    if finding.layers is None:
        return True
    return symptom.layers is not None and {*symptom.layers} <= {*finding.layers}
