"""The job files that travel with the package, known by name: ``deepseek_v3/debug``."""

from __future__ import annotations

from pathlib import Path

from titan_moe_lb.errors import JobError, near

CONFIGS = Path(__file__).parents[1] / "configs"
"""In a checkout a link to ``configs/`` at its top, in a wheel the files themselves."""


def names(model: str = "*") -> list[str]:
    """Of the job files of a model, or of all."""
    return [f"{path.parent.name}/{path.stem}" for path in sorted(CONFIGS.glob(f"{model}/*.toml"))]


def find(job: str) -> Path:
    """What ``--job-config`` means: a path of the user's that exists, else a name.

    Raises:
        JobError: it is neither.
    """
    if Path(job).exists():
        return Path(job)
    known = names()
    if job in known:
        return CONFIGS / f"{job}.toml"
    raise JobError(
        f"--job-config {job}: there is no such file, and no job of that name"
        f"{near(job, known) or '; --list shows them'}"
    )
