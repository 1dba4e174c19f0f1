"""Job files of the package and their names, such as ``deepseek_v3/debug``."""

from __future__ import annotations

from pathlib import Path

from titan_moe_lb.errors import JobError, near

CONFIGS = Path(__file__).parents[1] / "configs"
"""A link to ``configs/`` in a checkout; the files themselves in a wheel."""


def names(model: str = "*") -> list[str]:
    """Return the names of the job files of a model; default: of all models."""
    return [f"{path.parent.name}/{path.stem}" for path in sorted(CONFIGS.glob(f"{model}/*.toml"))]


def find(job: str) -> Path:
    """Find the file that ``--job-config`` names: an existing path, else a job of the package."""
    if Path(job).exists():
        return Path(job)
    known = names()
    if job in known:
        return CONFIGS / f"{job}.toml"
    raise JobError(
        f"--job-config {job}: there is no such file, and no job of that name"
        f"{near(job, known) or '; --list shows them'}"
    )
