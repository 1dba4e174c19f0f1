"""The command ``titan-moe-lb place``."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from titan_moe_lb.checkpoints import placement_file
from titan_moe_lb.checkpoints.placement_file import ExpertOrder
from titan_moe_lb.checkpoints.resume_point import is_finished, steps_in
from titan_moe_lb.commands.place import new_folder
from titan_moe_lb.commands.place.by_expert import ExpertTensors, expert_tensors
from titan_moe_lb.commands.place.checkpoint_files import CheckpointFiles, Moves
from titan_moe_lb.commands.place.distributed import DistributedFiles
from titan_moe_lb.commands.place.safetensors_files import SafetensorsFiles
from titan_moe_lb.errors import JobError
from titan_moe_lb.traces.expert_order import contiguous, overload
from titan_moe_lb.traces.step_windows import tenth
from titan_moe_lb.traces.trace import MOST_BYTES, Trace, read_trace, trace_file

FEW_STEPS = 10
"""Number of steps below which loads do not decide about a placement."""


def place(
    path: Path,
    *,
    output: Path,
    from_run: Path | None = None,
    ep: int | None = None,
    groups: str | None = None,
    file: Path | None = None,
    undo: bool = False,
) -> list[str]:
    """Write a checkpoint with the experts of its MoE layers in another order.

    The arguments are those of ``titan-moe-lb place``; ``file`` is its ``--placement``.

    Returns:
        Lines that describe the result.

    Raises:
        JobError: the first error. Nothing is left at ``output``.
    """
    folder = _checkpoint_of(path)
    alone = output.suffix == ".json"
    is_distributed = (folder / ".metadata").is_file()
    files = DistributedFiles(folder) if is_distributed else SafetensorsFiles(folder)
    new_folder.check(output, 0 if alone else files.num_bytes)
    try:
        layers = expert_tensors(files.tensors, files.objects)
    except JobError as error:
        raise JobError(f"{folder} cannot be placed: {error}") from None
    done = placement_file.of_checkpoint(folder)
    lines = [_what(folder, files, layers)]
    counts_ME, window = None, FEW_STEPS
    if undo:
        if from_run is not None or ep is not None or groups is not None or alone:
            raise JobError("--undo takes a placement back: it goes with --placement and -o alone")
        plan = _to_undo(folder, done, file)
    elif file is not None:
        if from_run is not None:
            raise JobError("--placement and --from-run are two placements: give one of them")
        plan = _given(placement_file.read(file), file, ep, groups)
    else:
        trace = _loads(path, folder, from_run, done)
        plan, counts_ME = _from_loads(trace, ep, groups)
        window = tenth(len(trace.steps))
    num_experts = {layer.layer: layer.num_experts for layer in layers}
    plan.check(num_experts, str(folder))
    if counts_ME is not None:
        lines.append(_gain(plan, counts_ME))
    if window < FEW_STEPS:
        lines.append(
            f"The loads are those of {window} step(s), too few to decide: record more, and compare "
            "with titan-moe-lb plan --from-run, whose Placing says what an earlier load saves"
        )
    if alone:
        plan.write(output)
        return [*lines, f"{output}: place {path} --placement {output} -o NEW applies it"]
    orders = plan.inverse() if undo else plan.orders
    moves: Moves = {}
    for layer in layers:
        moves.update(layer.moves(orders[layer.layer]))
    record = (done and done.earlier) if undo else dataclasses.replace(plan, earlier=done)
    _write(files, output, folder.relative_to(path), moves, record)
    moved = f"{len(moves):,} tensors by expert of {len(files.tensors):,} moved"
    lines.append(f"{output}: {moved}, read back and compared")
    if record is not None:
        lines.append(f"back again: titan-moe-lb place {output} --undo -o NEW")
    return lines


def _checkpoint_of(path: Path) -> Path:
    """Find the checkpoint: the folder itself, or the newest finished step of a run."""
    if not path.is_dir():
        raise JobError(f"{path}: there is no such folder: name a checkpoint, or a run that has one")
    if (path / ".metadata").is_file() or any(path.glob("*.safetensors")):
        return path
    for folder in (path / "checkpoint", path):
        steps = steps_in(folder)
        finished = [step for step in steps.values() if is_finished(step)]
        if finished:
            return finished[-1]
        if steps:
            raise JobError(f"no step in {folder} was saved whole: there is nothing to place")
    raise JobError(
        f"{path} has no checkpoint: neither .metadata nor *.safetensors nor checkpoint/step-N"
    )


def _what(folder: Path, files: CheckpointFiles, layers: list[ExpertTensors]) -> str:
    experts = sorted({layer.num_experts for layer in layers})
    moments = any(name.startswith("optimizer.state.") for name in files.tensors)
    with_them = "with optimizer state" if moments else "without optimizer state"
    return (
        f"{folder}: {len(layers)} MoE layer(s) of {' and '.join(map(str, experts))} experts, "
        f"{files.num_bytes / 1e9:,.3g} GB, {with_them}"
    )


def _to_undo(folder: Path, done: ExpertOrder | None, file: Path | None) -> ExpertOrder:
    if done is None and file is None:
        raise JobError(
            f"{folder} has no {placement_file.FILE_NAME}, nor has its run: name the one that it was "
            "placed with in --placement"
        )
    if done is not None and file is not None:
        raise JobError(f"{folder} has a placement of its own: leave --placement out")
    return done if done is not None else placement_file.read(file)  # type: ignore[arg-type]


def _given(plan: ExpertOrder, file: Path, ep: int | None, groups: str | None) -> ExpertOrder:
    if ep not in (None, plan.ep_degree):
        raise JobError(f"--ep is {ep}, and {file} is a placement for EP {plan.ep_degree}")
    if groups is not None and placement_file.parse_groups(groups) != plan.groups:
        raise JobError(f"--groups is {groups}, and {file} keeps groups {list(plan.groups)}")
    return plan


def _loads(path: Path, folder: Path, from_run: Path | None, done: ExpertOrder | None) -> Trace:
    """Read the trace of the loads to balance.

    Raises:
        JobError: there is no trace, its routing was forced, or it numbers the experts in another
            way than the checkpoint.
    """
    homes = (path, folder.parent.parent)
    own = next((home for home in homes if trace_file(home).is_file()), None)
    if from_run is None and own is None:
        raise JobError(f"--from-run is missing: no run wrote a trace beside {folder}")
    trace = read_trace(from_run or own, most_bytes=MOST_BYTES)  # type: ignore[arg-type]
    info, run = trace.info, trace.path.parent
    if info.forced_routing is not None:
        raise JobError(
            f"the routing of {run} was forced ({info.forced_routing}), so its loads do not belong to "
            "its experts: use a run without forced routing"
        )
    theirs = done.title if done is not None else None
    is_own = own is not None and run.resolve() == trace_file(own).parent.resolve()
    if info.placement != theirs and not is_own:
        raise JobError(
            f"the experts of {run} are {info.placement or 'as they were'}, and those of {folder} "
            f"{theirs or 'as they were'}: they have other numbers"
        )
    return trace


def _from_loads(trace: Trace, ep: int | None, groups: str | None) -> tuple[ExpertOrder, np.ndarray]:
    """Compute a placement from the last tenth of the steps.

    Returns:
        Placement, and the counts ``(M, E)`` that it balances.
    """
    info, run = trace.info, trace.path.parent
    if ep is None:
        raise JobError("--ep is missing: the expert-parallel degree to balance for, as in --ep 8")
    if ep < 2:
        raise JobError(f"--ep is {ep}; it must be at least 2")
    if groups is not None:
        together = placement_file.parse_groups(groups)
    elif info.expert_groups is not None:
        together = info.expert_groups
    else:
        raise JobError(
            f"{run} does not record whether experts are in groups that stay together: set --groups "
            "to the num_expert_groups of the router, or --groups 1 for none"
        )
    for number in together:
        for num_experts in info.num_experts_M:
            if num_experts % number:
                raise JobError(f"--groups {number} does not divide {num_experts} experts")
    window = tenth(len(trace.steps))
    steps = trace.steps[-window:]
    counts_ME = trace.counts_SME[-window:].sum(axis=0)
    spread = ", evenly spread ones" if trace.is_sample else ""
    loads = f"steps {steps[0]} to {steps[-1]} of {run}{spread}"
    return placement_file.from_loads(counts_ME, trace.layers, ep, together, loads), counts_ME


def _gain(plan: ExpertOrder, counts_ME: np.ndarray) -> str:
    """Describe the overload before and after; refuse a placement that does not reduce it."""
    ep, together = plan.ep_degree, plan.groups
    counts = [counts_E[counts_E >= 0] for counts_E in counts_ME]
    as_it_was = [contiguous(len(counts_E), ep) for counts_E in counts]
    before_M = np.array(list(map(overload, counts, as_it_was)))
    orders = [order[places] for order, places in zip(plan.orders.values(), as_it_was, strict=True)]
    after_M = np.array(list(map(overload, counts, orders)))
    if after_M.mean() >= before_M.mean():
        whole = f" of whole groups ({', '.join(map(str, together))})" if together else ""
        raise JobError(
            f"EP {ep}, {plan.loads}: no order{whole} was found that loads the ranks more evenly: there "
            "is nothing to place"
        )
    return (
        f"EP {ep}, {plan.loads}: the busiest rank got {before_M.mean():.3f} x the balanced tokens "
        f"(worst layer {before_M.max():.3f}); as placed {after_M.mean():.3f} x "
        f"(worst layer {after_M.max():.3f})"
    )


def _write(
    files: CheckpointFiles, output: Path, inside: Path, moves: Moves, record: ExpertOrder | None
) -> None:
    bar = Progress(
        TextColumn("writing and reading back"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    with new_folder.whole(output) as partial, bar:
        task = bar.add_task("", total=3 * files.num_bytes)
        target = partial / inside
        target.mkdir(parents=True, exist_ok=True)
        files.copy(target, moves, lambda count: bar.advance(task, count))
        if record is not None:
            record.write(partial / placement_file.FILE_NAME)
