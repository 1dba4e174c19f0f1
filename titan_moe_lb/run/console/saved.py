"""Checkpoint and trace that a run has saved, for its last message."""

from __future__ import annotations

import os
from typing import Any

from titan_moe_lb.checkpoints.resume_point import is_finished, is_remote, own_folder, steps_in
from titan_moe_lb.errors import JobError
from titan_moe_lb.traces.trace import last_step, trace_file


def in_words(config: Any, earlier: os.stat_result | None) -> str:
    """Describe the latest checkpoint and the last step of the trace.

    Args:
        config: a ``Trainer.Config``.
        earlier: :func:`trace_status` at the start of the run.
    """
    return f"{_checkpoint(config)}, {_trace(config, earlier)}"


def latest_checkpoint(config: Any) -> int | None:
    """Return the latest step that was saved completely.

    Returns:
        None if there is none, if checkpoints are off, or if their folder is remote.
    """
    if not config.checkpoint.enable or is_remote(config):
        return None
    steps = steps_in(own_folder(config))
    finished = [step for step, path in steps.items() if is_finished(path)]
    return max(finished, default=None)


def trace_status(config: Any) -> os.stat_result | None:
    """Return the status of the trace's file; None if there is none."""
    try:
        return os.stat(trace_file(config.dump_folder))
    except OSError:
        return None


def trace_is_written(config: Any, earlier: os.stat_result | None) -> bool:
    """Return True if the trace has another status than earlier, whatever the clock says."""
    now = trace_status(config)
    return now is not None and (earlier is None or _identity(now) != _identity(earlier))


def _checkpoint(config: Any) -> str:
    if not config.checkpoint.enable:
        return "no checkpoint (checkpoint.enable is off)"
    if is_remote(config):
        return f"checkpoints in {config.checkpoint.folder}"
    step = latest_checkpoint(config)
    if step is None:
        return "no checkpoint yet"
    return f"checkpoint of step {step} ({own_folder(config) / f'step-{step}'})"


def _trace(config: Any, earlier: os.stat_result | None) -> str:
    file = trace_file(config.dump_folder)
    try:
        step = last_step(file) if trace_is_written(config, earlier) else None
    except JobError:
        step = None
    return "no trace" if step is None else f"trace up to step {step} ({file})"


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
