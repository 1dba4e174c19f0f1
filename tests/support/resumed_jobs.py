"""Jobs of two ranks that save and resume, and the checks of their launcher."""

from __future__ import annotations

from pathlib import Path

import pytest

from titan_moe_lb.errors import JobError
from titan_moe_lb.job import job_config
from titan_moe_lb.resolved_job import Job
from titan_moe_lb.rules import validate_here
from titan_moe_lb.run.console import summary

JOB = [
    "--config",
    "deepseek_v3_tiny",
    "--model.aux_losses",
    '[{type="global_batch", weight=0.1}]',
    "--training.steps=4",
    "--checkpoint.enable",
    "--checkpoint.interval=2",
    "--checkpoint.no-last-save-model-only",
    "--debug.seed=1",
    "--debug.deterministic",
    "--parallelism.data_parallel_shard_degree=2",
]
BIAS = [*JOB[:2], *JOB[4:10], "--parallelism.expert_parallel_degree=2", *JOB[10:]]
SIGN, FROZEN = '{type = "sign", speed = 0.01}', '{type = "frozen"}'
RESET = '{type = "frozen", reset = true}'
LOAD_STEP_2 = "set checkpoint.load_step = 2"


def bias_job(folder: Path, rule: str) -> list[str]:
    """Command line of a job with a rule of the expert bias."""
    return [*BIAS, f"--model.expert_bias={rule}", f"--dump_folder={folder}"]


def resolved(folder: Path, rule: str, *flags: str, ranks: int = 2) -> Job:
    """Resolve the job as the launcher does for so many ranks."""
    return job_config.load([*bias_job(folder, rule), "--training.steps=9", *flags], ranks)


def files_of(folder: Path, rule: str, *flags: str, ranks: int = 2) -> None:
    """Check the files of the job as the launcher does before it starts a process."""
    validate_here(resolved(folder, rule, *flags, ranks=ranks))


def refusal(folder: Path, rule: str, *flags: str, ranks: int = 2) -> str:
    """The line that refuses the job."""
    with pytest.raises(JobError) as error:
        files_of(folder, rule, *flags, ranks=ranks)
    assert "\n" not in str(error.value)
    return str(error.value)


def start_line(folder: Path) -> str:
    """The line of the start, for the job with the sign rule."""
    return summary._start(resolved(folder, SIGN))
