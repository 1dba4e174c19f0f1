"""Tests of the device of a job, and of the GPUs that a test needs under ``--device cuda``."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from pathlib import Path

import pytest
import tomli
import torch

from tests.job.test_configs import CONFIGS, job_files
from tests.support.rank_pool import forkserver
from titan_moe_lb.upstream import cpu


def test_every_case_is_told_how_many_gpus_it_needs(tmp_path):
    process = forkserver().Process(target=run_without_gpus, args=(tmp_path / "shown",))
    process.start()
    process.join(120)
    shown = (tmp_path / "shown").read_text()
    assert process.exitcode == 0, shown
    said = dict(re.findall(r"^(\S+\[?.*\]?): Skipped: needs (\d+) GPUs?, 0 are here$", shown, re.M))
    for path in job_files():
        case = f"tests/job/test_configs.py::test_job_file_trains[{path.parent.name}/{path.stem}]"
        assert int(said[case]) == tomli.loads(path.read_text())["job"]["ranks"]
    assert any("test_telemetry" in case for case in said)
    assert "test_report" not in shown and " deselected" in shown


def run_without_gpus(output: Path) -> None:
    """Run pytest in this process, which has done the imports."""
    files = ["job/test_configs.py", "commands/test_report.py", "telemetry/test_telemetry.py"]
    os.chdir(CONFIGS.parent)
    with output.open("w") as shown, contextlib.redirect_stdout(shown):
        status = pytest.main(
            ["--device=cuda", "-pno:cacheprovider", *(f"tests/{file}" for file in files)]
        )
    sys.exit(status)


@pytest.mark.parametrize(
    ("kind", "needed"), [("cuda", False), ("xpu", False), ("mps", True), (None, True)]
)
def test_an_apple_gpu_is_no_accelerator_to_torchtitan(monkeypatch, kind, needed):
    """The test replaces torch's report of such a machine, because none is available."""
    device = None if kind is None else torch.device(kind)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: device)
    assert cpu.needed() == needed
