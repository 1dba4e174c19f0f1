"""What a user sees who runs the launcher: one line and status 2, or a job that trains."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import titan_moe_lb
from tests.support.train_jobs import train
from titan_moe_lb.run import launch
from titan_moe_lb.upstream import cpu

TINY = ["--module", "deepseek_v3", "--config", "deepseek_v3_tiny"]


JOB_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "NGPU",
    "NNODES",
    "LOG_RANK",
    "MODULE",
    "CONFIG",
    "COMM_MODE",
)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items() if name not in JOB_VARIABLES}
    return subprocess.run(
        [sys.executable, "-m", "titan_moe_lb.cli", "train", *arguments],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        (["--module", "deepseek_v4"], {}, "did you mean 'deepseek_v3'?"),
        (
            [*TINY, "--parallelism.pipeline_parallel_degree=4"],
            {"NGPU": "2"},
            "the job runs in 2 process(es) but its parallelism (pipeline_parallel_degree 4) "
            "needs a multiple of 4: set NGPU=4",
        ),
        ([*TINY], {"NGPU": "two"}, "NGPU=two must be a whole number"),
        (["--job-config", "configs/deepseek_v3/671b.toml"], {}, "COMM_MODE=fake_backend NGPU=2048"),
        (
            [*TINY, "--hf_assets_path=./nowhere"],
            {},
            "hf_assets_path './nowhere' is not a folder",
        ),
        ([*TINY], {"NNODES": "2", "NGPU": "1"}, "NNODES=2 needs RDZV_ENDPOINT=HOST:PORT"),
        ([*TINY], {"LOG_RANK": "all"}, "LOG_RANK=all must be ranks"),
    ],
    ids=["module", "processes", "NGPU", "2048 ranks", "assets", "nodes", "LOG_RANK"],
)
def test_wrong_job_is_one_line_and_status_2(arguments, environment, expected, monkeypatch, capsys):
    for name in JOB_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop:
        launch.main(arguments)
    assert stop.value.code == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if "titan_moe_lb" in text]
    assert line.startswith("titan_moe_lb: error: ")
    assert expected in line


def test_public_face_is_imported_when_it_is_used():
    """Help has to be instant."""
    program = (
        "import sys, titan_moe_lb; assert not {'torch', 'torchtitan'} & set(sys.modules); "
        "assert all(getattr(titan_moe_lb, name) for name in dir(titan_moe_lb)); "
        "print(*dir(titan_moe_lb))"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    names = set(result.stdout.split())
    assert {"balanced", "SequenceWiseAuxLoss", "SignBias", "FrozenBias", "HotRank"} <= names
    with pytest.raises(AttributeError, match="blanced"):
        titan_moe_lb.blanced  # noqa: B018


@pytest.mark.parametrize(
    ("kind", "needed"), [("cuda", False), ("xpu", False), ("mps", True), (None, True)]
)
def test_an_apple_gpu_is_no_accelerator_to_torchtitan(monkeypatch, kind, needed):
    """What torch reports there; there is no such machine to test on."""
    device = None if kind is None else torch.device(kind)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: device)
    assert cpu.needed() == needed


def test_validation_of_a_debug_job_needs_no_network(ranks):
    flags = ["--training.steps=2", "--validator.enable", "--validator.freq=2"]
    flags += ["--validator.steps=10"]
    ((first, second),) = ranks.run(1, train, ["--config", "deepseek_v3_tiny", *flags])
    losses = [step["validation_metrics/loss"] for step in (first, second)]
    assert losses[1] < losses[0] < 9.0


def test_wrong_job_is_no_traceback_for_the_shell():
    result = run("--module", "deepseek_v4")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("titan_moe_lb: error: --module 'deepseek_v4'")
    assert "Traceback" not in result.stderr + result.stdout
