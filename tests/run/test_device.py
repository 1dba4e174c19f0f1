"""Tests of the device of a job, and of the GPUs that a test needs under ``--device cuda``."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import tomli
import torch

from tests.job.test_configs import CONFIGS, job_files
from titan_moe_lb.upstream import cpu


def test_every_case_is_told_how_many_gpus_it_needs():
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "--device", "cuda", "tests/job/test_configs.py"]
        + ["tests/commands/test_report.py", "tests/telemetry/test_telemetry.py"],
        cwd=CONFIGS.parent,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    said = dict(
        re.findall(r"^(\S+\[?.*\]?): Skipped: needs (\d+) GPUs?, 0 are here$", result.stdout, re.M)
    )
    for path in job_files():
        case = f"tests/job/test_configs.py::test_job_file_trains[{path.parent.name}/{path.stem}]"
        assert int(said[case]) == tomli.loads(path.read_text())["job"]["ranks"]
    assert any("test_telemetry" in case for case in said)
    assert "test_report" not in result.stdout and " deselected" in result.stdout


@pytest.mark.parametrize(
    ("kind", "needed"), [("cuda", False), ("xpu", False), ("mps", True), (None, True)]
)
def test_an_apple_gpu_is_no_accelerator_to_torchtitan(monkeypatch, kind, needed):
    """The test replaces torch's report of such a machine, because none is available."""
    device = None if kind is None else torch.device(kind)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: device)
    assert cpu.needed() == needed
