"""Tests of the cause that a failed run names, and of the log lines on its console."""

from __future__ import annotations

import copy
import errno
import logging
import sys

import pytest
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torchtitan.components import metrics

from tests.support.failing_jobs import FAILURES
from titan_moe_lb.errors import JobError
from titan_moe_lb.job import job_config
from titan_moe_lb.resolved_job import Job
from titan_moe_lb.run.console import cause, rank_log


@pytest.fixture(scope="module")
def job():
    return job_config.load(["--config", "deepseek_v3_tiny"])


FULL = OSError(errno.ENOSPC, "No space left on device", "outputs/y")


@pytest.mark.parametrize(
    ("error", "named", "status"),
    [
        (JobError("a key"), "a key", 2),
        (FAILURES["disk"](), "outputs/x", 1),
        (FAILURES["memory"](), "OutOfMemoryError: Tried to allocate 20.00 GiB", 1),
        (FAILURES["checkpoint"](), "ValueError: cut", 1),
        (CheckpointException("save", {0: (FULL, None)}), "outputs/y", 1),  # type: ignore[dict-item]
        (FileNotFoundError(errno.ENOENT, "No such file", "here/x"), "here/x: No such file", 1),
        (MemoryError(), "MemoryError", 1),
        (RuntimeError("[gloo/tcp] Connection closed by peer"), "lost the connection", 1),
        (dist.DistStoreError("gone"), "lost the connection", 1),
        (KeyError("x"), "KeyError: 'x'", 1),
    ],
)
def test_cause_of_an_exception(error, named, status, job):
    found = cause.of_error(error, job, at_start=False)
    assert named in found.line and "\n" not in found.line
    assert found.status == status and found.has_traceback == (status == 1)
    assert found.is_echo == ("connection" in named)


def test_a_checkpoint_that_cannot_be_read_is_named(job, tmp_path):
    config = copy.deepcopy(job.config)
    config.checkpoint.enable = True
    config.dump_folder = str(tmp_path)
    (tmp_path / "checkpoint/step-3").mkdir(parents=True)
    (tmp_path / "checkpoint/step-3/.metadata").touch()
    found = cause.of_error(FAILURES["checkpoint"](), Job.of(config, 1), at_start=True)
    assert f"{tmp_path}/checkpoint/step-3" in found.line and "ValueError: cut" in found.line
    assert found.status == 2 and found.has_traceback


RANK = """
import json, os, signal, sys, time
from pathlib import Path
folder, *kinds = sys.argv[1:]
rank = int(os.environ["RANK"])
kind = kinds[rank]
def write(line, status=1, is_echo=False):
    ours = dict(status=status, has_traceback=True, is_echo=is_echo, time=time.time())
    message = dict(message=line, extraInfo=dict(py_callstack=line, timestamp=str(int(time.time()))))
    with open(os.environ["TORCHELASTIC_ERROR_FILE"], "w") as file:
        json.dump(dict(message=message, titan_moe_lb=ours), file)
    Path(folder, str(rank)).touch()
def tell(line, status=1, is_echo=False):
    write(line, status, is_echo)
    os._exit(status)
def after_the_other():
    while not Path(folder, str(1 - rank)).exists():
        time.sleep(0.01)
if kind == "echo":
    if rank: after_the_other()
    write("echo", is_echo=True)
    if kinds[1] == "bug": after_the_other()
    os._exit(1)
if kind == "bug":
    if kinds[0] == "echo": after_the_other()
    tell("a bug")
if kind == "user": tell("[training] steps", status=2)
if kind == "kill": os.kill(os.getpid(), signal.SIGKILL)
if kind == "abort":
    after_the_other()
    os.abort()
if kind == "silent": os._exit(7)
signal.pause()
"""
"""Program of a rank without torch, which is cheap; it writes a rank's output."""


@pytest.mark.parametrize(
    ("ranks", "culprit", "named", "status"),
    [
        (["echo", "bug"], 1, "a bug", 1),
        (["echo", "kill"], 1, "SIGKILL", 1),
        (["abort", "bug"], 1, "a bug", 1),
        (["echo", "echo"], 0, "echo", 1),
        (["wait", "user"], 1, "[training] steps", 2),
        (["wait", "silent"], 1, "status 7", 1),
    ],
)
def test_of_several_processes_the_first_cause_is_named(ranks, culprit, named, status, tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=len(ranks),
        run_id="x",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.5,
        logs_specs=DefaultLogsSpecs(str(tmp_path / "errors")),
    )
    with pytest.raises(ChildFailedError) as error:
        elastic_launch(config, sys.executable)(str(script), str(tmp_path), *ranks)
    found, log = cause.of_processes(error.value, tmp_path)
    assert named in found.line and found.status == status
    assert status == 2 or f"rank {culprit}" in found.line
    assert log.name == f"rank{culprit}.log"


def test_lines_of_the_log_that_the_console_shows(tmp_path, monkeypatch, capsys):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "filters", [])
    monkeypatch.setattr(logging, "raiseExceptions", True)
    first: list[int] = []
    known = rank_log.StepLine(loss=False, peak_flops=False)
    rank_log.begin(shown=True, known=known, first_step=lambda: first.append(1))

    def log(path: str, level: int, text: str) -> None:
        root.handle(logging.LogRecord("root", level, path, 1, text, (), None, "log"))

    step = "\x1b[31mstep:  1  \x1b[32mloss: -2.00000  \x1b[33mgrad_norm:  1.0  \x1b[35mmfu: 3.00%"
    log("torchtitan/trainer.py", logging.WARNING, "chosen at the start")
    log(metrics.__file__, logging.INFO, step)
    for _again in range(2):
        log("torchtitan/trainer.py", logging.WARNING, "news")
        log("torchtitan/trainer.py", logging.INFO, "detail")
    log(rank_log.__file__, logging.INFO, "ours")
    out, err = capsys.readouterr()
    assert out.splitlines() == ["step:  1  grad_norm:  1.0", "warning: news", "ours"]
    for text in ("chosen at the start", "grad_norm", "detail", "ours"):
        assert text in err
    assert "loss" not in err and "\x1b" not in err and first == [1]


@pytest.mark.parametrize(
    ("environment", "in_color"),
    [({"FORCE_COLOR": "1"}, True), ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False), ({}, False)],
)
def test_colour_is_for_a_terminal_that_wants_it(environment, in_color, monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm-256color", **environment}.items():
        monkeypatch.setenv(name, value)
    record = logging.LogRecord("root", logging.INFO, "", 1, "\x1b[31mred", (), None)
    shown = rank_log._ForUsers("").format(record)
    assert shown == ("\x1b[31mred" if in_color else "red")
