"""What a user sees who runs the launcher: one line and status 2, or a job that trains."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from titan_moe_lb import launch

TINY = ["--module", "deepseek_v3", "--config", "deepseek_v3_tiny"]


JOB_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
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
        [sys.executable, "-m", "titan_moe_lb.launch", *arguments],
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
    for name, value in {"WORLD_SIZE": "1", **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop:
        launch.main(arguments)
    assert stop.value.code == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if "titan_moe_lb" in text]
    assert line.startswith("titan_moe_lb: error: ")
    assert expected in line


def test_wrong_job_is_no_traceback_for_the_shell():
    result = run("--module", "deepseek_v4")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("titan_moe_lb: error: --module 'deepseek_v4'")
    assert "Traceback" not in result.stderr + result.stdout


def test_two_processes_show_the_rank_that_sees_the_loss(tmp_path):
    """MODULE and CONFIG from the environment, as torchtitan's users type them."""
    result = run(
        "--training.steps=2",
        "--parallelism.pipeline_parallel_degree=2",
        f"--dump_folder={tmp_path}",
        "--metrics.disable_color_printing",
        MODULE="deepseek_v3",
        CONFIG="deepseek_v3_tiny",
        NGPU="2",
    )
    output = result.stdout + result.stderr
    assert result.returncode == 0, output[-3000:]
    lines = [line for line in output.splitlines() if "step:  2" in line]
    assert len(lines) == 1 and lines[0].startswith("[rank1]:")
    assert "loss: -" not in lines[0]
    assert "seq_load_balancing_loss: 1." in output
    assert "Pipeline Parallel loss is not visible" not in output
