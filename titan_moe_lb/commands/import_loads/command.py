"""The command ``titan-moe-lb import``."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from titan_moe_lb.commands.import_loads.source_files import record_batches
from titan_moe_lb.commands.import_loads.steps import Step, StepReader
from titan_moe_lb.errors import JobError
from titan_moe_lb.traces.load_trace import LoadTrace
from titan_moe_lb.traces.trace import last_step, trace_file


def import_loads(
    files: Sequence[Path],
    *,
    output: Path,
    top_k: int | None,
    num_experts: int | None = None,
    ep: int | None = None,
    micro_batches: int | None = None,
    model: str | None = None,
    drops_tokens: bool = False,
) -> list[str]:
    """Write a run folder from files of tokens per expert.

    Args:
        files: files of one run, in the order of their steps.
        output: folder of the new run.
        top_k: experts that a token chooses.
        num_experts: experts of a layer; default: from the first step.
        ep: expert-parallel degree; default 1.
        micro_batches: forwards of a step over all ranks; default 1.
        model: name of the model; default: that of the first file.
        drops_tokens: True if the counts leave out tokens over a capacity.

    Returns:
        Lines about the run, and about what was guessed.

    Raises:
        JobError: a file or an argument is wrong, or the folder has a trace. No trace is left then.
    """
    if not files:
        raise JobError("FILE is missing: name the files of the run's loads")
    if trace_file(output).exists():
        raise JobError(f"{trace_file(output)} exists: name another folder with --output")
    if top_k is None:
        raise JobError("--top-k is missing: the number of experts that a token chooses")
    for flag, value in {
        "--top-k": top_k,
        "--num-experts": num_experts,
        "--ep": ep,
        "--micro-batches": micro_batches,
    }.items():
        if value is not None and value < 1:
            raise JobError(f"{flag} is {value}: give a number from 1")
    trace = LoadTrace(
        output,
        top_k=top_k,
        ep=1 if ep is None else ep,
        micro_batches=1 if micro_batches is None else micro_batches,
        model=model or files[0].stem,
        drops_tokens=drops_tokens,
    )
    try:
        console = Console(stderr=True)
        hidden = not console.is_terminal
        with Progress(console=console, transient=True, disable=hidden) as progress, trace:
            first, last, num_steps, dense = _written(files, trace, num_experts, progress)
        if not trace.path.exists() or last_step(output) != last:
            raise JobError(f"{output} could not be written whole: free space on its disk")
    except BaseException:
        trace.path.unlink(missing_ok=True)
        raise
    if any(len(counts_E) % (ep or 1) for counts_E in first.counts.values()):
        trace.path.unlink()
        raise JobError(f"--ep is {ep}, which does not divide the experts of a layer")
    sizes = sorted({len(counts_E) for counts_E in first.counts.values()})
    tokens = int(next(iter(first.counts.values())).sum()) // top_k
    guessed = [
        *(["--ep 1"] if ep is None else []),
        *(["--micro-batches 1"] if micro_batches is None else []),
        *([f"layers without tokens are dense: {_listed(dense)}"] if dense else []),
    ]
    return [
        f"{output}: {num_steps:,} steps ({first.number} to {last}), {len(first.counts)} MoE "
        f"layer{'s' * (len(first.counts) > 1)} "
        f"of {' and '.join(map(str, sizes))} experts, {tokens:,} tokens in the first step",
        *([f"guessed: {', '.join(guessed)}"] if guessed else []),
        f"next: titan-moe-lb report {output}; diagnose {output}; or plan --from-run {output} "
        f"--hardware DEVICE --job-config JOB, a job with these experts and top {top_k}",
    ]


def _written(
    files: Sequence[Path], trace: LoadTrace, num_experts: int | None, progress: Progress
) -> tuple[Step, int, int, list[int]]:
    """Write all steps.

    Returns:
        The first step with its MoE layers, the number of the last one, the number of steps, and
        the dense layers.
    """
    reader = StepReader(num_experts)
    steps: Iterator[Step] = itertools.chain.from_iterable(
        reader.read(record_batches(file, progress), str(file)) for file in files
    )
    first: Step | None = None
    dense: list[int] = []
    last, num_steps = 0, 0
    for step in steps:
        if not any(np.any(counts_E) for counts_E in step.counts.values()):
            raise JobError(f"step {step.number} has no tokens: leave its rows out")
        if first is None:
            dense = [layer for layer, counts_E in step.counts.items() if not np.any(counts_E)]
        elif step.number <= last:
            raise JobError(
                f"step {step.number} comes after step {last}: sort the rows by step, and name the "
                "files in the order of their steps"
            )
        for layer in dense:
            if np.any(step.counts.pop(layer, 0)):
                raise JobError(
                    f"layer {layer} has tokens in step {step.number}, and none in the first step: "
                    "leave out the steps before its first tokens"
                )
        first = first or step
        trace.write(step.number, step.counts, **step.numbers)
        last, num_steps = step.number, num_steps + 1
    if first is None:
        raise JobError(f"{files[0]} has no rows: name a file with loads")
    return first, last, num_steps, dense


def _listed(layers: list[int]) -> str:
    return ", ".join(map(str, sorted(layers)))
