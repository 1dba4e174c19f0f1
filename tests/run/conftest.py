"""Checkpoints that the tests of this folder continue."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.bias_jobs import biases_of_a_run
from tests.support.resumed_jobs import SIGN, bias_job


@pytest.fixture(scope="session")
def learned(ranks, tmp_path_factory):
    """Folder of a run of two steps with the sign rule, and its learned biases."""
    folder = tmp_path_factory.mktemp("learned")
    found = ranks.run(2, biases_of_a_run, [*bias_job(folder, SIGN), "--training.steps=2"])[0]
    assert found["loaded"].abs().max() == 0 and found["trained"].abs().max() >= 0.01
    return folder, found["trained"]


@pytest.fixture
def run(learned, tmp_path) -> Path:
    """Copy of that run, to continue."""
    return Path(shutil.copytree(learned[0], tmp_path / "run"))


@pytest.fixture
def two_steps(run) -> Path:
    """Copy with two steps, of which the second is complete."""
    shutil.copytree(run / "checkpoint/step-2", run / "checkpoint/step-4")
    return run
