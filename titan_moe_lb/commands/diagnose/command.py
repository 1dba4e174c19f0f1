"""The command ``titan-moe-lb diagnose``."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path

from titan_moe_lb.commands.answer.answer import Answer
from titan_moe_lb.commands.answer.plain_data import as_json as answer_as_json
from titan_moe_lb.commands.answer.terminal import print_answer
from titan_moe_lb.commands.diagnose.examined_run import ExaminedRun
from titan_moe_lb.commands.diagnose.finding import Severity
from titan_moe_lb.commands.diagnose.runs_table import runs_table
from titan_moe_lb.traces.named_runs import NamedRuns
from titan_moe_lb.traces.run_names import run_names


def diagnose(run_dirs: Sequence[Path], *, as_json: bool = False, fail_on: str = "never") -> int:
    """Print the findings on a run, or a table of several runs.

    Args:
        run_dirs: runs, folders of runs, and patterns; see :meth:`NamedRuns.of`.
        as_json: print an object instead: ``steps``, ``is_sample``, ``findings`` and ``well`` of
            one run, or of each of ``runs``, with the messages of those ``left_out``.
        fail_on: lowest severity that returns 1, or "never".

    Returns:
        Exit status. 1 if one of several runs cannot be read. Unless ``fail_on`` is "never", also 1
        if a finding is at least as severe, or a run is too short; else 0.

    Raises:
        JobError: no run is found, or none can be read.
    """
    found = NamedRuns.of(run_dirs)
    runs = [ExaminedRun.of(trace) for trace in found.traces()]
    if not found.is_single:
        answer = _of_several(runs, found)
        print(answer_as_json(answer)) if as_json else print_answer(answer)
    elif as_json:
        print(json.dumps(runs[0].plain_data(), indent=2))
    else:
        print(_sentences(runs[0]))
    if fail_on == "never":
        return int(bool(found.left_out))
    bad = [
        run
        for run in runs
        if run.too_short
        or any(one.severity >= Severity[fail_on.upper()] for one in run.diagnosis.findings)
    ]
    return int(bool(bad or found.left_out))


def _of_several(runs: Sequence[ExaminedRun], found: NamedRuns) -> Answer:
    names = run_names([run.info for run in runs], [run.path for run in runs])
    notes = found.notes + [
        f"{name}: {sentence}"
        for name, run in zip(names.names, runs, strict=True)
        for sentence in run.damage
    ]
    return Answer(
        kind="Diagnosis",
        title="Runs",
        headline=notes,
        sections=[runs_table(runs, names)],
        numbers={
            "runs": [
                {
                    "name": name,
                    "path": str(run.path),
                    "ended": run.ended,
                    "last_step": run.last_step,
                    "loss": run.loss,
                    "max_violation": run.max_violation,
                    **run.plain_data(),
                }
                for name, run in zip(names.names, runs, strict=True)
            ],
            "left_out": {str(path): error for path, error in found.left_out.items()},
        },
    )


def _sentences(run: ExaminedRun) -> str:
    if run.too_short:
        return f"{run.path}: {run.too_short}"
    steps, found = f"{run.path}, {run.steps}", run.diagnosis
    well = [f"  {kind.replace('_', ' '):<24} {seen}" for kind, seen in found.well.items()]
    if not found.findings:
        head = f"{steps}: nothing is wrong with the balance. Checked in the last quarter:"
        return "\n".join([head, *well])
    blocks = [f"{steps}:"]
    if run.too_early:
        blocks.append(run.too_early)
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
    if well:
        blocks.append("\n".join(["Nothing is wrong with the rest, in the last quarter:", *well]))
    return "\n\n".join(blocks)
