"""Checkpoint and trace that a run has saved, for its last message."""

from __future__ import annotations

import os
from typing import Any

from titan_moe_lb.checkpoints.start import is_finished, is_remote, own_folder, steps_in
from titan_moe_lb.errors import JobError
from titan_moe_lb.traces.trace import read_trace, trace_file


def in_words(config: Any, begun: float) -> str:
    """Describe the latest checkpoint and the last step of the trace.

    Args:
        config: a ``Trainer.Config``.
        begun: start of the run, in seconds since the epoch; an older trace is another run's.
    """
    return f"{_checkpoint(config)}, {_trace(config, begun)}"


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


def trace_is_written(config: Any, begun: float) -> bool:
    """Return True if the trace was written since ``begun``, in seconds since the epoch."""
    try:
        return os.stat(trace_file(config.dump_folder)).st_mtime >= begun
    except OSError:
        return False


def _checkpoint(config: Any) -> str:
    if not config.checkpoint.enable:
        return "no checkpoint (checkpoint.enable is off)"
    if is_remote(config):
        return f"checkpoints in {config.checkpoint.folder}"
    step = latest_checkpoint(config)
    if step is None:
        return "no checkpoint yet"
    return f"checkpoint of step {step} ({own_folder(config) / f'step-{step}'})"


def _trace(config: Any, begun: float) -> str:
    if not trace_is_written(config, begun):
        return "no trace"
    file = trace_file(config.dump_folder)
    try:
        return f"trace up to step {int(read_trace(file).steps[-1])} ({file})"
    except (JobError, IndexError):
        return "no trace"
