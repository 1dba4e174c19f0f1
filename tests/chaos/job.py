"""Faulty job: start it with a launcher, and compare it with an undisturbed run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tests.chaos.fault_signals import FaultSignal
from tests.support.job_processes import fork
from tests.support.saved_tensors import tensors
from titan_moe_lb.traces.trace import read_trace

RANKS, STEPS, INTERVAL = 2, 8, 2
JOB = (
    "--module=tests.chaos.fault_signals",
    "--config=tiny",
    f"--training.steps={STEPS}",
    "--training.local_batch_size=2",
    "--model.aux_losses=[{type='global_batch', weight=0.1}]",
    "--model.expert_bias={type='momentum'}",
    f"--parallelism.data_parallel_shard_degree={RANKS}",
    f"--parallelism.expert_parallel_degree={RANKS}",
    "--metrics.log_freq=1",
    "--checkpoint.enable",
    f"--checkpoint.interval={INTERVAL}",
    "--checkpoint.no-last-save-model-only",
    "--checkpoint.keep_latest_k=0",
    "--debug.seed=1",
    "--debug.deterministic",
    "--debug.no-enable-structured-logging",
)
_SECONDS = 240
_TIMED = ("tokens_per_second", "step_seconds")
"""Columns of the trace that differ between any two runs."""


@dataclass(frozen=True)
class End:
    """Status and last line of a run."""

    status: int
    line: str = ""

    @property
    def ok(self) -> bool:
        return not self.status


def start(folder: Path, fault: FaultSignal | None = None, *flags: str) -> End:
    """Run the job until it ends or a fault ends it."""
    variables = fault.environment() if fault else {}
    job = fork(folder, *JOB, *flags, NGPU=str(RANKS), **variables)
    _out, err = job.communicate(_SECONDS)
    assert job.returncode is not None
    return End(job.returncode, err.strip())


def differences(folder: Path, peaceful: Path, lost: frozenset[int] = frozenset()) -> list[str]:
    """List the files and numbers that differ from the undisturbed run in any bit.

    Args:
        lost: steps whose record in the trace the fault destroyed.
    """
    found, expected = tensors(folder, STEPS), tensors(peaceful, STEPS)
    assert len(expected) > 100
    wrong = sorted(found.keys() ^ expected.keys())
    wrong += [n for n in expected if n in found and not torch.equal(found[n], expected[n])]
    trace, whole = read_trace(folder), read_trace(peaceful)
    kept = [index for index, step in enumerate(whole.steps) if int(step) not in lost]
    if trace.steps.tolist() != whole.steps[kept].tolist():
        return [*wrong, f"steps of the trace: {trace.steps.tolist()}"]
    if trace.damage and not lost:
        wrong.append(trace.damage[0])
    if not np.array_equal(trace.counts_SME, whole.counts_SME[kept]):
        wrong.append("counts of the trace")
    for name, values in (whole.layer_columns | whole.step_columns).items():
        others = (trace.layer_columns | trace.step_columns)[name]
        if name not in _TIMED and not np.array_equal(others, values[kept], equal_nan=True):
            wrong.append(f"{name} of the trace")
    return wrong
