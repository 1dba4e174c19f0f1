"""Tests of making ``.venv``, with substitutes for pip and venv, because the real installation takes
minutes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.job_processes import until

ROOT = Path(__file__).parents[2]

# Records what it is asked to install and works as long as there is a file "wait". As pip does, it
# takes a folder, or a folder with extras in brackets, which are not empty.
PIP = """
import re, sys, time, pathlib
if not pathlib.Path(re.sub(r"\\[[^\\]]+\\]$", "", sys.argv[-1])).is_dir():
    sys.exit(f"ERROR: {{sys.argv[-1]}} is not a valid editable requirement")
root = pathlib.Path({root!r})
with open(root / "pip.log", "a") as log:
    log.write(" ".join(sys.argv[1:]) + chr(10))
print("installing", *sys.argv[-2:])
print((root / "error").read_text())
while (root / "wait").exists():
    time.sleep(0.02)
sys.exit(int((root / "status").read_text()))
"""


# The standard library's, without the seconds that it takes to unpack the real pip.
VENV = """
import sys
sys.path.remove({folder!r})
import venv
venv.main(["--without-pip", *sys.argv[1:]])
"""

APT_GET = """#!/bin/sh
echo "$@" >> {root}/apt-get.log
exit $(cat {root}/status)
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    shutil.copy(ROOT / "bootstrap.py", tmp_path)
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (tmp_path / "error").write_text("")
    (tmp_path / "status").write_text("0")
    fake = tmp_path / "fake" / "pip"
    fake.mkdir(parents=True)
    (fake / "__main__.py").write_text(PIP.format(root=str(tmp_path)))
    (fake / "__init__.py").touch()
    (fake.parent / "venv.py").write_text(VENV.format(folder=str(fake.parent)))
    # PYTHONPATH comes before the standard library and site-packages: "python -m" finds the stand-ins.
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
    return [line.split()[-1] for line in log.read_text().splitlines()] if log.exists() else []


def test_installs_once_and_again_when_pyproject_changes(checkout):
    said, status = run(checkout)
    assert status == 0 and "setting up .venv" in said
    assert run(checkout) == ("", 0)
    assert installs(checkout) == ["."]
    assert run(checkout, "test")[1] == 0
    assert installs(checkout) == [".", ".[test]"]
    (checkout / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    assert run(checkout)[1] == 0
    assert installs(checkout) == [".", ".[test]", ".[test]"], "the extras are kept"


def test_interrupted_installation_is_started_over(checkout):
    (checkout / "status").write_text("1")
    assert run(checkout)[1] == 1
    leftover = checkout / ".venv" / "half-installed"
    leftover.touch()
    (checkout / "status").write_text("0")
    assert run(checkout)[1] == 0
    assert not leftover.exists()
    assert run(checkout) == ("", 0)


def test_an_environment_without_its_python_is_made_anew(checkout):
    assert run(checkout)[1] == 0
    shutil.rmtree(checkout / ".venv" / "bin")
    assert run(checkout)[1] == 0
    assert os.access(checkout / ".venv" / "bin" / "python", os.X_OK)


def test_a_failure_is_one_line_with_the_last_error(checkout):
    (checkout / "status").write_text("1")
    (checkout / "error").write_text("ERROR: No match for x\nhint: none\n")
    said, status = run(checkout)
    assert status == 1
    (line,) = [line for line in said.splitlines() if "error" in line]
    assert "ERROR: No match for x" in line and "hint" not in said and "Traceback" not in said


def test_a_checkout_that_cannot_be_written_names_where_the_environment_can_go(checkout):
    (checkout / ".venv.lock").mkdir()  # root may write to a read-only folder; nobody to this
    said, status = run(checkout)
    assert status == 1 and "Traceback" not in said
    (line,) = [line for line in said.splitlines() if "error" in line]
    assert f"pip install {checkout}" in line


@pytest.mark.skipif(os.geteuid() != 0, reason="installs for root alone")
def test_root_gets_the_programs_that_are_missing(checkout):
    assert run(checkout)[1] == 0
    assert not (checkout / "apt-get.log").exists(), "only the tests need them"
    assert run(checkout, "test")[1] == 0
    update, install = (checkout / "apt-get.log").read_text().splitlines()
    assert update.startswith("update") and install.endswith(" chromium iproute2")
    (checkout / "programs" / "chromium").symlink_to("/bin/true")
    assert run(checkout, "test")[1] == 0
    assert (checkout / "apt-get.log").read_text().splitlines()[-1].endswith("recommends iproute2")
    (checkout / "programs" / "ip").symlink_to("/bin/true")
    assert run(checkout, "test") == ("", 0)
    assert len((checkout / "apt-get.log").read_text().splitlines()) == 4


@pytest.mark.skipif(os.geteuid() != 0, reason="installs for root alone")
def test_a_program_that_cannot_be_installed_is_one_line(checkout):
    (checkout / "status").write_text("100")
    said, status = run(checkout, "test")
    assert status == 1 and "apt-get" in said and "Traceback" not in said


def test_second_run_waits_for_the_first(checkout):
    (checkout / "wait").touch()
    first = start(checkout)
    until(lambda: installs(checkout))
    second = start(checkout)
    assert "setting up" in second.stderr.readline()  # and next it asks for the lock
    (checkout / "wait").unlink()
    for process in (first, second):
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert installs(checkout) == ["."], "the second run installs nothing"
