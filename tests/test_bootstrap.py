"""Making ``.venv``, with a stand-in for pip: the real installation takes minutes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import bootstrap

ROOT = Path(__file__).parent.parent

# Records what it is asked to install and takes as long as the test says.
PIP = """
import sys, time, pathlib
root = pathlib.Path({root!r})
with open(root / "pip.log", "a") as log:
    log.write(" ".join(sys.argv[1:]) + chr(10))
print("installing", *sys.argv[-2:], flush=True)
time.sleep(float((root / "seconds").read_text()))
sys.exit(int((root / "status").read_text()))
"""


APT_GET = """#!/bin/sh
echo "$@" >> {root}/apt-get.log
exit $(cat {root}/status)
"""


def write(checkout, **constants):
    """bootstrap.py, with other constants."""
    text = (ROOT / "bootstrap.py").read_text()
    for name, value in constants.items():
        text, count = re.subn(rf"^{name} = \S+", f"{name} = {value}", text, flags=re.MULTILINE)
        assert count == 1
    (checkout / "bootstrap.py").write_text(text)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    write(tmp_path, NEEDED_SPACE="1e6")
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (tmp_path / "seconds").write_text("0")
    (tmp_path / "status").write_text("0")
    fake = tmp_path / "fake" / "pip"
    fake.mkdir(parents=True)
    (fake / "__main__.py").write_text(PIP.format(root=str(tmp_path)))
    (fake / "__init__.py").touch()
    # PYTHONPATH comes before site-packages, so that "python -m pip" finds the stand-in.
    monkeypatch.setenv("PYTHONPATH", str(fake.parent))
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "apt-get").write_text(APT_GET.format(root=tmp_path))
    (programs / "cat").symlink_to("/bin/cat")
    (programs / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    return tmp_path


def start(checkout, *extras):
    return subprocess.Popen(
        [sys.executable, "bootstrap.py", *extras], cwd=checkout, stderr=subprocess.PIPE, text=True
    )


def run(checkout, *extras):
    process = start(checkout, *extras)
    return process.communicate(timeout=60)[1], process.returncode


def installs(checkout):
    log = checkout / "pip.log"
    lines = log.read_text().splitlines() if log.exists() else []
    return [line.split()[-1] for line in lines if line.startswith("install")]


def test_installs_once_and_again_when_pyproject_changes(checkout):
    said, status = run(checkout)
    assert status == 0 and "creating .venv" in said and "ready after" in said
    assert run(checkout) == ("", 0)
    assert installs(checkout) == ["."]
    assert run(checkout, "test")[1] == 0
    assert installs(checkout) == [".", ".[test]"]
    (checkout / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    assert run(checkout)[1] == 0
    assert installs(checkout) == [".", ".[test]", ".[test]"], "the extras are kept"


def test_interrupted_installation_is_started_over(checkout):
    (checkout / "status").write_text("1")
    said, status = run(checkout)
    assert status == 1 and "bootstrap: error: the installation did not finish" in said
    assert "Traceback" not in said
    leftover = checkout / ".venv" / "half-installed"
    leftover.touch()
    (checkout / "status").write_text("0")
    assert run(checkout)[1] == 0
    assert not leftover.exists()
    assert json.loads((checkout / ".venv" / "installed.json").read_text())["extras"] == []


def test_what_has_gone_is_noticed_and_installed_again(checkout):
    write(checkout, NEEDED_SPACE="1e6", SECONDS_BETWEEN_LINES="0.3")
    (checkout / "seconds").write_text("0.5")
    said = run(checkout)[0]
    assert "0 s: installing -e ." in said, "a line while it lasts"
    stamp = json.loads((checkout / ".venv" / "installed.json").read_text())
    (package,) = (name for name in stamp["packages"] if name.startswith("pip=="))
    (folder,) = (checkout / ".venv" / "lib").glob("*/site-packages/pip")
    shutil.rmtree(folder)
    said, status = run(checkout)
    assert status == 0 and f"gone from .venv, and installed again: {package}\n" in said
    assert installs(checkout) == [".", package, "."]

    shutil.rmtree(checkout / ".venv" / "bin")
    said, status = run(checkout)
    assert status == 0 and "creating .venv" in said
    assert os.access(checkout / ".venv" / "bin" / "python", os.X_OK)


def test_a_checkout_that_cannot_be_written_is_one_line(checkout):
    """A folder in the place of the lock stands for a read-only disk, which root can write to."""
    (checkout / ".venv.lock").mkdir()
    said, status = run(checkout)
    assert status == 1 and said.count("\n") == 1 and str(checkout) in said
    assert not (checkout / ".venv").exists()


def test_what_hinders_it_is_one_line(checkout, monkeypatch, capsys):
    write(checkout, NEEDED_SPACE="1e18")
    said, status = run(checkout)
    assert status == 1 and said.count("\n") == 1 and "make room" in said
    write(checkout, MINIMUM_PYTHON="(9, ")
    said, status = run(checkout)
    assert status == 1 and said.count("\n") == 1
    assert "bootstrap: error: Python 9.11 or newer is needed, this is 3" in said
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        ("ERROR: Could not install: [Errno 28] No space left on device\n", "the disk is full"),
        ("WARNING: Retrying after NameResolutionError\nERROR: No match\n", "index can be reached"),
        ("Collecting x\nERROR: No match for x\nhint: none\n", "ERROR: No match for x (.venv/inst"),
        ("", "it said nothing"),
    ],
)
def test_cause_of_a_failed_installation(said, cause):
    assert cause in bootstrap._cause(said.splitlines(keepends=True))


@pytest.mark.skipif(os.geteuid() != 0, reason="installs for root alone")
def test_root_gets_the_programs_that_are_missing(checkout):
    assert run(checkout)[1] == 0
    assert not (checkout / "apt-get.log").exists(), "only the tests need them"
    assert run(checkout, "test")[1] == 0
    update, install = (checkout / "apt-get.log").read_text().splitlines()
    assert update.startswith("update") and install.endswith(" chromium iproute2")
    (checkout / "programs" / "chrome").symlink_to("/bin/true")
    assert run(checkout, "test")[1] == 0
    assert (checkout / "apt-get.log").read_text().splitlines()[-1].endswith("recommends iproute2")
    (checkout / "programs" / "ip").symlink_to("/bin/true")
    assert run(checkout, "test") == ("", 0)
    assert len((checkout / "apt-get.log").read_text().splitlines()) == 4


@pytest.mark.skipif(os.geteuid() != 0, reason="installs for root alone")
def test_a_program_that_cannot_be_installed_is_one_line(checkout):
    (checkout / "status").write_text("100")
    said, status = run(checkout, "test")
    assert status == 1 and "bootstrap: error: the installation did not finish" in said
    assert "Traceback" not in said


def test_second_run_waits_for_the_first(checkout):
    (checkout / "seconds").write_text("4")
    first = start(checkout)
    deadline = time.monotonic() + 30
    while not installs(checkout) and time.monotonic() < deadline:
        time.sleep(0.1)
    second = start(checkout)
    said = second.communicate(timeout=60)[1]
    assert second.returncode == 0
    assert f"process {first.pid} is setting up .venv; waiting" in said
    assert first.wait(timeout=60) == 0
    assert installs(checkout) == ["."], "the second run installs nothing"
