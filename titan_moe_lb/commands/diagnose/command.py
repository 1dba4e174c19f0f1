"""The command ``titan-moe-lb diagnose``."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from pathlib import Path

from titan_moe_lb.commands.diagnose.checks import Diagnosis, diagnosis
from titan_moe_lb.commands.diagnose.finding import Severity
from titan_moe_lb.commands.diagnose.window import FEWEST_STEPS, Window
from titan_moe_lb.traces.trace import MOST_BYTES, Trace, read_trace

EARLY = 60
"""Step before which no method has balanced a new model (docs/evidence/study.md)."""


def diagnose(run_dir: Path, *, as_json: bool = False, fail_on: str = "never") -> int:
    """Print the findings on a run.

    Args:
        run_dir: folder of the run, or its trace.
        as_json: print an object with ``steps``, ``is_sample``, ``findings`` and ``well`` instead of sentences.
        fail_on: lowest severity that returns 1, or "never".

    Returns:
        Exit status. 1 if a finding is at least as severe as ``fail_on``, or if the run is too
        short; else 0. With "never", always 0.

    Raises:
        JobError: the trace cannot be read.
    """
    trace = read_trace(run_dir, most_bytes=MOST_BYTES)
    enough, found = Window(trace).is_long_enough, diagnosis(trace)
    print(_json(trace, found) if as_json else _sentences(trace, found, enough))
    if fail_on == "never":
        return 0
    bad = [finding for finding in found.findings if finding.severity >= Severity[fail_on.upper()]]
    return int(bool(bad) or not enough)


def _json(trace: Trace, found: Diagnosis) -> str:
    rows = [
        {**dataclasses.asdict(finding), "severity": finding.severity.name.lower()}
        for finding in found.findings
    ]
    answer = {
        "steps": len(trace.steps),
        "is_sample": trace.is_sample,
        "findings": rows,
        "well": found.well,
    }
    return json.dumps(answer, indent=2)


def _sentences(trace: Trace, found: Diagnosis, enough: bool) -> str:
    if not enough:
        changed = trace.info.balanced_since
        since = f" since the balancing changed at step {changed}" if changed else ""
        number = len(trace.steps) - trace.balanced_since
        return (
            f"{trace.path}: {number} logged steps{since} are too few for a diagnosis: at least "
            f"{FEWEST_STEPS} are needed."
        )
    steps = f"{trace.path}, steps {trace.steps[0]} to {trace.steps[-1]}"
    if trace.is_sample:
        steps += f", {len(trace.steps)} of them, evenly spread"
    if not found.findings:
        head = f"{steps}: nothing is wrong with the balance. Checked in the last quarter:"
        well = [f"  {kind.replace('_', ' '):<24} {seen}" for kind, seen in found.well.items()]
        return "\n".join([head, *well])
    blocks = [f"{steps}:"]
    if trace.steps[-1] < EARLY:
        blocks.append(
            f"Before step {EARLY} uneven loads of a new model are expected: in docs/evidence/study.md "
            "a balance takes 60 to 300 steps."
        )
    for finding in found.findings:
        lines = [
            f"{finding.severity.name.lower()} ({finding.kind.replace('_', ' ')}): {finding.what}",
            f"  seen      {finding.evidence}",
            f"  why       {finding.reason}",
            *(f"  leads to  {what}" for what in finding.explains.values()),
            f"  do        {finding.remedy}",
            *([f"  try       {finding.toml}"] if finding.toml else []),
        ]
        blocks.append(
            "\n".join(textwrap.fill(line, 100, subsequent_indent=" " * 12) for line in lines)
        )
    return "\n\n".join(blocks)
