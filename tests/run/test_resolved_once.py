"""Tests of a start: each process resolves its job, finds its checkpoint and builds its meta model
once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tests.support import counted_jobs
from tests.support.job_processes import end, fork

RESOLVED = {"validation": 1, "look for the checkpoint": 1}


def calls_of_each_process(folder: Path, *flags: str, **variables: str) -> list[dict[str, int]]:
    """Count the calls by name, for the launcher first."""
    file = folder / "counts"
    job = ["--module=tests.support.counted_jobs", "--config=tiny", "--checkpoint.enable", *flags]
    process = fork(folder, *job, **variables, **{counted_jobs.FILE: str(file)})
    status, _out, err = end(process, folder)
    assert status == 0, err
    calls = [line.split(" ", 1) for line in file.read_text().splitlines()]
    file.unlink()
    return [
        dict(Counter(name for process, name in calls if process == one))
        for one in dict.fromkeys(process for process, _name in calls)
    ]


def test_one_process_resolves_its_job_once(tmp_path):
    """The first run is fresh, the second starts from its checkpoint."""
    flags = ["--checkpoint.no-last_save_model_only", "--checkpoint.interval=1"]
    for steps in (1, 2):
        (alone,) = calls_of_each_process(tmp_path, *flags, f"--training.steps={steps}")
        assert alone == RESOLVED | {"meta model": 1}


def test_a_launcher_and_its_ranks_resolve_their_job_once_each(tmp_path):
    launcher, *ranks = calls_of_each_process(tmp_path, "--training.steps=1", NGPU="2")
    assert launcher == RESOLVED
    # The rank that the user sees prints the number of parameters.
    assert sorted(ranks, key=len) == [RESOLVED, RESOLVED | {"meta model": 1}]
