"""Tests of refused input: status 2, the key in the message, nothing started or written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.refused import commands, jobs, scene
from titan_moe_lb.costmodel.jobs import read_job, read_served
from titan_moe_lb.run import launch, rank_processes

LINES = commands.REPORT | commands.PLAN | commands.PLACE | commands.CHECK | jobs.FLAGS
BY_TYRO = commands.BY_TYRO | jobs.BY_TYRO


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return scene.build(tmp_path_factory.mktemp("scene"))


def no_start(*_arguments, **_more) -> None:
    raise AssertionError("the job was started or built")


@pytest.fixture
def refused(folder, monkeypatch, capsys):
    """Run a line that is refused; return standard error."""

    def refused(line: str) -> str:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(launch, "_run_here", no_start)
        monkeypatch.setattr(rank_processes, "run", no_start)
        for build in (read_job, read_served):  # minutes for a large model
            monkeypatch.setattr(build, build.__name__.rpartition(".")[2], no_start)
        before = scene.state(folder)
        with pytest.raises(SystemExit) as stop:
            scene.type_in(line, monkeypatch)
        assert stop.value.code == 2
        assert scene.state(folder) == before
        return capsys.readouterr().err

    return refused


def assert_one_line(said: str, key: str) -> None:
    assert said.count("\n") == 1 and said.startswith("titan_moe_lb: error: "), said
    assert key in said
    for internal in ("model_spec", "imbalance_factor", "num_hot_experts", "Traceback"):
        assert internal not in said


@pytest.mark.parametrize("line", LINES)
def test_one_line_names_the_key(line, refused):
    assert_one_line(refused(line), LINES[line])


@pytest.mark.parametrize("text", jobs.FILES)
def test_one_line_names_the_key_of_a_job_file(text, refused, tmp_path):
    job = tmp_path / "job.toml"
    job.write_text(text if "[job]" in text else f"{scene.TINY_JOB}{text}")
    assert_one_line(refused(f"train --job-config {job}"), jobs.FILES[text])


@pytest.mark.parametrize("line", BY_TYRO)
def test_tyro_names_what_is_wrong(line, refused):
    said = refused(line)
    assert BY_TYRO[line] in said and "Traceback" not in said
