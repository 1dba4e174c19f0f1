"""Tests of the wheel in an empty environment outside the repository, and of ``doctor``."""

from __future__ import annotations

import ast
import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import titan_moe_lb
from tests.support.job_processes import JOB_VARIABLES
from titan_moe_lb.commands import doctor
from titan_moe_lb.job import job_files

ROOT = Path(__file__).parents[2]
SOURCES = ("titan_moe_lb", "model_registry", "configs")
FILES = ("pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> Path:
    """``bin`` of an environment with our wheel and the torch of this process.

    A .pth file adds the packages of this environment, without its own .pth files, so that the
    finder of an editable installation stays out.
    """
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / "source" / name, symlinks=True, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, folder / "source")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "--no-cache-dir"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([*pip, *build, str(folder / "source")], check=True)
    (wheel,) = folder.glob("*.whl")
    environment = folder / "environment"
    venv.create(environment)
    site = environment / "lib" / Path(sysconfig.get_path("purelib")).parent.name / "site-packages"
    install = ["install", "--no-deps", "--no-index", "--ignore-installed", str(wheel)]
    subprocess.run([*pip, "--python", str(environment / "bin" / "python"), *install], check=True)
    (site / "of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return environment / "bin"


@pytest.fixture
def run(programs, tmp_path):
    clean = {name: value for name, value in os.environ.items() if name not in JOB_VARIABLES}
    clean.pop("PYTHONPATH", None)

    def run(*arguments: str) -> str:
        result = subprocess.run(
            [str(programs / "titan-moe-lb"), *arguments],
            cwd=tmp_path,
            env=clean,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
        return result.stdout

    return run


def test_wheel_has_every_file_of_its_packages(programs):
    (wheel,) = programs.parents[1].glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    source = programs.parents[1] / "source"
    files = {
        str(Path(folder, name).relative_to(source))
        for package in ("titan_moe_lb", "model_registry")
        for folder, _folders, names in os.walk(source / package, followlinks=True)
        for name in names
    }
    assert packed == files


def test_wheel_trains_a_job_by_name_and_looks_at_it(run, programs, tmp_path):
    small = ["--training.steps=2", "--training.local_batch_size=1", "--training.seq_len=64"]
    run("train", "--job-config", "deepseek_v3/debug", *small, "--debug.seed=0")
    page = tmp_path / "outputs" / "report.html"
    assert run("report", "outputs").startswith(f"{page.relative_to(tmp_path)}: 2 steps")
    assert "step 2" in run("watch", "outputs", "--once")


def test_doctor_of_the_wheel_finds_it_whole(run, programs):
    said = run("doctor")
    assert f"titan_moe_lb {titan_moe_lb.__version__} in {programs.parent}" in said
    assert "MISSING" not in said
    for what in ("python", "packages", "devices", "processes", "attention", "compiler"):
        assert f"ok      {what} " in said
    assert f"{len(job_files.names())} job files" in said


def test_shell_completion_knows_the_commands(run):
    completion = run("--tyro-print-completion", "bash")
    for command in ("train", "report", "watch", "plan", "doctor"):
        assert command in completion


def test_doctor_says_what_is_missing_and_the_remedy(tmp_path, monkeypatch):
    """The distribution or a requirement of it is missing or damaged."""
    info = tmp_path / "half-1.0.dist-info"
    info.mkdir()
    needs = ["no-such-thing>=3", "rich>=999", "tyro>=0.9", "torch>=99; extra == 'more'"]
    (info / "METADATA").write_text(
        "\n".join(["Name: half", "Version: 1.0", *(f"Requires-Dist: {need}" for need in needs)])
    )
    (info / "RECORD").write_text("half/__init__.py,,\nhalf/data.txt,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    lost, *others = sorted(str(finding) for finding in doctor.packages("half"))
    assert all(line.startswith("MISSING packages") for line in (lost, *others))
    assert "half are missing: pip install --force-reinstall --no-deps 'half==1.0'" in lost
    assert "pip install 'no-such-thing>=3'" in others[0]
    assert "rich is " in others[1] and "pip install 'rich>=999'" in others[1]
    assert len(others) == 2


def test_doctor_ends_with_status_1_where_something_is_missing(monkeypatch, capsys):
    def broken() -> str:
        raise OSError("libtorch.so:\n cut")

    monkeypatch.setattr(doctor, "packages", lambda name: iter(()))
    monkeypatch.setattr(doctor, "_LOOKS", {"devices": broken})
    with pytest.raises(SystemExit) as stop:
        doctor.main()
    assert stop.value.code == 1
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == "MISSING devices     OSError: libtorch.so: cut: install titan-moe-lb again"


def test_threads_wait_without_spinning_unless_the_user_says():
    """The setting is chosen before torch is loaded, which reads it once."""
    program = (
        "import os, sys; from titan_moe_lb import cli, host_threads; assert 'torch' not in sys.modules;"
        "host_threads.wait_without_spinning(); print(os.environ['OMP_WAIT_POLICY'])"
    )
    for given, expected in ({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active"):
        clean = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
        said = subprocess.check_output(
            [sys.executable, "-c", program], env=clean | given, cwd=ROOT, text=True
        )
        assert said.strip() == expected


def test_every_public_name_is_what_its_stub_names():
    """``__init__.pyi`` lists the names by module, and ``import *`` gives the same names."""
    tree = ast.parse(Path(titan_moe_lb.__file__).with_suffix(".pyi").read_text())
    for node in tree.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            assert alias.asname == alias.name, "a stub exports what it names twice"
            home = importlib.import_module(f"titan_moe_lb.{node.module or alias.name}")
            public = getattr(titan_moe_lb, alias.name)
            assert public is (getattr(home, alias.name) if node.module else home)
    assert {"attach", "balanced", "functional", "trainer_config"} < set(titan_moe_lb.__all__)
    assert titan_moe_lb.__version__
