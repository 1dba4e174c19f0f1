"""What a person sees of a run that goes well, fails, or is stopped: real processes.

A run of one process and one of two are started as a user does; the others are forked.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed import TCPStore
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torchtitan.components import metrics

from tests.run.test_launch import JOB_VARIABLES
from tests.support import counted_jobs
from tests.support.failing_jobs import FAILURES
from tests.support.forked_start import ForkedStart
from titan_moe_lb.errors import JobError
from titan_moe_lb.job import job_config
from titan_moe_lb.resolved_job import Job
from titan_moe_lb.run import processes
from titan_moe_lb.run.console import cause, rank_log
from titan_moe_lb.run.console.signals import ended_by
from titan_moe_lb.terminal.heartbeat import Heartbeat

TINY = ["--module=deepseek_v3", "--config=deepseek_v3_tiny", "--metrics.log_freq=1"]


def start(
    folder: Path, *arguments: str, within: tuple[str, ...] = (), **environment: str
) -> subprocess.Popen:
    """A run; ``within`` is the command of a place to start it in."""
    train = [sys.executable, "-m", "titan_moe_lb.cli", "train"]
    return subprocess.Popen(
        [*within, *train, *arguments, f"--dump_folder={folder}"],
        env=of_a_start(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def fork(folder: Path, *arguments: str, **environment: str) -> ForkedStart:
    """The same where it is not the start that is looked at."""
    return ForkedStart([*arguments, f"--dump_folder={folder}"], of_a_start(environment))


def of_a_start(environment: dict[str, str]) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if name not in JOB_VARIABLES}
    return {**clean, "OMP_NUM_THREADS": "1", **environment}


def read_to(process: subprocess.Popen | ForkedStart, text: str) -> list[str]:
    """The lines up to the first one with the text in it."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError(f"no {text!r} in {''.join(lines)}{process.stderr.read()}")


def end(process: subprocess.Popen | ForkedStart) -> tuple[int, list[str], str]:
    """Status, lines of standard output, standard error; and nobody is left behind."""
    out, err = process.communicate(timeout=120)
    (folder,) = process.args[-1:]
    assert not [one.pid for one in psutil.process_iter() if folder in _words(one)]
    return process.returncode, out.splitlines(), err


def _words(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []


def test_first_command_fits_one_screen_without_colour_and_the_rest_is_in_the_log(tmp_path):
    status, out, err = end(start(tmp_path, *TINY, "--training.steps=10"))
    assert status == 0 and err == "" and len(out) <= 40, (out, err)
    assert "\x1b" not in "".join(out)
    assert [line.split()[0] for line in out[:6]] == [
        *("model", "layout", "balancing", "data", "output", "start"),
    ]
    steps = [line for line in out if line.startswith("step:")]
    assert len(steps) == 10 and all("loss:" in line for line in steps)
    assert "mfu" not in "".join(out) or torch.accelerator.is_available()
    assert out[-1].startswith("done") and f"titan-moe-lb report {tmp_path}" in out[-1]
    log = (tmp_path / "logs/rank0.log").read_text()
    assert str(tmp_path / "logs/rank0.log") in "".join(out)
    assert "Training completed" in log and "\x1b" not in log


def test_ctrl_c_of_one_process(tmp_path):
    process = fork(tmp_path, *TINY, "--training.steps=1000", "--metrics.enable_tensorboard")
    read_to(process, "step:  3")
    process.send_signal(signal.SIGINT)
    begun = time.monotonic()
    status, _out, err = end(process)
    assert status == 130 and time.monotonic() - begun < 10
    assert err.count("\n") == 1 and "stopped by Ctrl-C; saved: no checkpoint" in err, err
    assert f"trace up to step {last_step(err)} ({tmp_path / 'moe_load.arrow'})" in err
    (events,) = tmp_path.glob("**/events.out.tfevents*")
    sink = EventAccumulator(str(events)).Reload()
    assert {event.step for event in sink.Scalars("loss_metrics/global_avg_loss")} >= {1, 2, 3}


def last_step(line: str) -> int:
    step = int(line.partition("trace up to step ")[2].split()[0])
    assert step >= 3
    return step


def test_stop_of_two_processes_says_what_is_saved(tmp_path):
    flags = ["--checkpoint.enable", "--checkpoint.interval=2", "--training.steps=1000"]
    process = start(tmp_path, *TINY, *flags, NGPU="2")
    read_to(process, "step:  4")
    process.send_signal(signal.SIGTERM)
    status, _out, err = end(process)
    assert status == 143 and err.count("\n") == 1, err
    assert "stopped by SIGTERM; saved: checkpoint of step " in err
    step = err.partition("checkpoint of step ")[2].split()[0]
    assert (tmp_path / f"checkpoint/step-{step}/.metadata").is_file()
    assert last_step(err)


def test_a_rank_that_is_killed_is_named_and_not_the_one_that_lost_it(tmp_path):
    process = fork(tmp_path, *TINY, "--training.steps=1000", NGPU="2")
    read_to(process, "step:  2")
    ranks = psutil.Process(process.pid).children()
    (second,) = (one for one in ranks if one.environ().get("RANK") == "1")
    second.kill()
    status, _out, err = end(process)
    assert status == 1 and err.count("\n") == 1, err
    assert err.startswith("titan_moe_lb: error: rank 1 was killed by SIGKILL")
    assert str(tmp_path / "logs/rank1.log") in err and "trace up to step" in err


@pytest.mark.parametrize(
    ("failure", "line"),
    [
        ("bug", "error: RuntimeError: a bug; saved: no checkpoint"),
        ("checkpoint", "error: a checkpoint failed (ValueError: cut); saved: no checkpoint"),
    ],
)
def test_a_failure_is_one_line_and_its_traceback_is_in_the_log(failure, line, tmp_path):
    job = ["--module=tests.support.failing_jobs", "--config=tiny", "--training.steps=5"]
    status, out, err = end(fork(tmp_path, *job, FAILURE=failure))
    assert status == 1 and err.count("\n") == 1, err
    assert err.startswith(f"titan_moe_lb: {line}")
    log = tmp_path / "logs/rank0.log"
    assert f"traceback: {log}" in err and "Traceback" not in "".join(out)
    assert "Traceback (most recent call last)" in log.read_text()


def meeting_port() -> int:
    """One that the system gives to nobody who asks for any that is free (32768 and above)."""
    return 20000 + os.getpid() % 10000


def test_two_nodes_meet_and_only_the_one_that_knows_the_loss_shows_it(tmp_path):
    """One goes by an IPv6 address, so both do."""
    endpoint = f"[::1]:{meeting_port()}"
    flags = ["--training.steps=2", "--parallelism.pipeline_parallel_degree=2"]
    both = [
        fork(
            tmp_path,
            *flags,
            MODULE="deepseek_v3",
            CONFIG="deepseek_v3_tiny",
            NNODES="2",
            NODE_RANK=str(node),
            NGPU="1",
            RDZV_ENDPOINT=endpoint,
        )
        for node in (0, 1)
    ]
    first, second = (process.communicate(timeout=240) for process in both)
    assert [process.returncode for process in both] == [0, 0], (first, second)
    assert "loss" not in first[0] and "the node of rank 1 shows the steps" in first[0]
    assert second[0].count("step:  2  loss:  ") == 1 and "seq_load_balancing_loss: 1." in second[0]
    assert first[1] == second[1] == ""
    log = (tmp_path / "logs/rank0.log").read_text()
    assert "step:  2  grad_norm" in log and "loss: -" not in log


def test_a_second_node_that_never_comes_is_one_line(tmp_path):
    endpoint = f"localhost:{meeting_port()}"
    nodes = {"NNODES": "2", "NODE_RANK": "1", "NGPU": "1", "RDZV_ENDPOINT": endpoint}
    status, _out, err = end(fork(tmp_path, *TINY, **nodes, RDZV_TIMEOUT="1"))
    assert status == 1 and err.count("\n") == 1, err
    assert f"RDZV_ENDPOINT={endpoint}: the 2 nodes have not found each other in RDZV_TIME" in err
    assert "nothing answers there (Connection refused)" in err


def test_what_is_seen_at_the_meeting_point(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        port = stranger.getsockname()[1]
        monkeypatch.setenv("RDZV_ENDPOINT", f"127.0.0.1:{port}")
        meeting = processes._Meeting(sys.stderr, nodes=2)
        assert "what answers there is no node of a job" in meeting._waits(15)
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("RDZV_ENDPOINT", f"localhost:{store.port}")
    assert "not all of the 2 nodes" in processes._Meeting(sys.stderr, nodes=2)._waits(15)


def test_patience_speaks_again_and_not_when_it_is_over():
    said: list[int] = []
    twice = threading.Event()

    def what(seconds: int) -> str:
        said.append(seconds)
        if len(said) == 2:
            twice.set()
        return "still"

    with Heartbeat(lambda line: None, what, after=0.5):
        assert twice.wait(30)
    heard = len(said)
    time.sleep(1.2)
    assert len(said) == heard and said[:2] == [0, 1]


def test_a_signal_is_heard_while_the_main_thread_is_busy():
    heard: list[signal.Signals] = []
    before = signal.getsignal(signal.SIGTERM)
    done = threading.Event()

    def end(number: signal.Signals) -> None:
        heard.append(number)
        done.set()

    with ended_by(end):
        os.kill(os.getpid(), signal.SIGTERM)
        assert done.wait(5)
    assert heard == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) == before


@pytest.fixture(scope="module")
def job():
    return job_config.load(["--config", "deepseek_v3_tiny"])


@pytest.mark.parametrize(
    ("error", "expected", "status"),
    [
        (JobError("a key"), "a key", 2),
        (FAILURES["disk"](), "the disk of outputs/x is full: free some space, or name", 1),
        (FAILURES["memory"](), "out of memory (OutOfMemoryError: Tried to allocate 20.00 GiB", 1),
        (FAILURES["checkpoint"](), "a checkpoint failed (ValueError: cut)", 1),
        (FileNotFoundError(errno.ENOENT, "No such file", "here/x"), "here/x: No such file", 1),
        (MemoryError(), "out of memory (MemoryError)", 1),
        (RuntimeError("[gloo/tcp] Connection closed by peer"), "it lost the connection to", 1),
        (dist.DistStoreError("gone"), "it lost the connection to another process (DistStore", 1),
        (KeyError("x"), "KeyError: 'x'", 1),
    ],
)
def test_cause_of_an_exception(error, expected, status, job):
    found = cause.of_error(error, job, at_start=False)
    assert found.line.startswith(expected) and "\n" not in found.line
    assert found.status == status and found.has_traceback == (status == 1)
    assert found.is_echo == ("connection" in expected)


def test_a_checkpoint_that_cannot_be_read_is_named(job, tmp_path):
    config = copy.deepcopy(job.config)
    config.checkpoint.enable = True
    config.dump_folder = str(tmp_path)
    (tmp_path / "checkpoint/step-3").mkdir(parents=True)
    (tmp_path / "checkpoint/step-3/.metadata").touch()
    found = cause.of_error(FAILURES["checkpoint"](), Job.of(config, 1), at_start=True)
    assert found.line.startswith(f"{tmp_path}/checkpoint/step-3 cannot be loaded (ValueError: cut)")
    assert found.status == 2 and found.has_traceback


def test_a_full_disk_under_a_checkpoint_is_the_cause(job):
    full = OSError(errno.ENOSPC, "No space left on device", "outputs/y")
    error = CheckpointException("save", {0: (full, None)})  # type: ignore[dict-item]
    assert "the disk of outputs/y is full" in cause.of_error(error, job, at_start=False).line


@pytest.mark.parametrize(
    ("ranks", "expected", "status"),
    [
        (["echo", "bug"], "rank 1: a bug", 1),
        (["echo", "kill"], "rank 1 was killed by SIGKILL", 1),
        (["abort", "bug"], "rank 1: a bug", 1),
        (["echo", "echo"], "rank 0: echo", 1),
        (["wait", "user"], "[training] steps", 2),
        (["wait", "silent"], "rank 1 ended with status 7 and no word", 1),
    ],
)
def test_of_several_processes_the_first_cause_is_told(ranks, expected, status, tmp_path):
    """Without torch in them, so that they are cheap: they write what a rank writes."""
    script = tmp_path / "rank.py"
    script.write_text(
        f"""
import json, os, signal, sys, time
kind = {ranks!r}[int(os.environ["RANK"])]
def tell(line, status=1, is_echo=False):
    ours = dict(status=status, has_traceback=True, is_echo=is_echo, time=time.time())
    message = dict(message=line, extraInfo=dict(py_callstack=line, timestamp=str(int(time.time()))))
    with open(os.environ["TORCHELASTIC_ERROR_FILE"], "w") as file:
        json.dump(dict(message=message, titan_moe_lb=ours), file)
    os._exit(status)
if kind == "echo":
    time.sleep(0.3 * int(os.environ["RANK"]))  # or two that start at once would race
    tell("echo", is_echo=True)
if kind == "bug": time.sleep(0.02); tell("a bug")
if kind == "user": tell("[training] steps", status=2)
if kind == "kill": os.kill(os.getpid(), signal.SIGKILL)
if kind == "abort": os.abort()
if kind == "silent": os._exit(7)
time.sleep(60)
"""
    )
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
        elastic_launch(config, sys.executable)(str(script))
    found, log = cause.of_processes(error.value, tmp_path)
    assert found.line.startswith(expected) and found.status == status
    assert log.name == f"rank{0 if ranks == ['echo', 'echo'] else 1}.log"


def test_what_the_console_shows(tmp_path, monkeypatch, capsys):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "filters", [])
    monkeypatch.setattr(logging, "raiseExceptions", True)
    first: list[int] = []
    known = rank_log.StepLine(loss=False, peak_flops=False)
    rank_log.begin(shown=True, known=known, first_step=lambda: first.append(1))

    def say(path: str, level: int, text: str, function: str = "log") -> None:
        root.handle(logging.LogRecord("root", level, path, 1, text, (), None, function))

    step = "\x1b[31mstep:  1  \x1b[32mloss: -2.00000  \x1b[33mgrad_norm:  1.0  \x1b[35mmfu: 3.00%"
    say("torchtitan/trainer.py", logging.WARNING, "chosen at the start")
    say(metrics.__file__, logging.INFO, step)
    for _again in range(2):
        say("torchtitan/trainer.py", logging.WARNING, "news")
        say("torchtitan/trainer.py", logging.INFO, "detail")
    say(rank_log.__file__, logging.INFO, "ours")
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


def calls_of_each_process(folder: Path, *flags: str, **environment: str) -> list[dict[str, int]]:
    """Counts by name, the launcher first."""
    file = folder / "counts"
    job = ["--module=tests.support.counted_jobs", "--config=tiny", "--checkpoint.enable", *flags]
    status, _out, err = end(fork(folder, *job, **environment, **{counted_jobs.FILE: str(file)}))
    assert status == 0, err
    calls = [line.split(" ", 1) for line in file.read_text().splitlines()]
    file.unlink()
    return [
        dict(Counter(name for process, name in calls if process == one))
        for one in dict.fromkeys(process for process, _name in calls)
    ]


RESOLVED = {"validation": 1, "look for the checkpoint": 1}


def test_a_start_resolves_its_job_once(tmp_path):
    """Fresh, then from the checkpoint of the first."""
    flags = ["--checkpoint.no-last_save_model_only", "--checkpoint.interval=1"]
    for steps in (1, 2):
        (alone,) = calls_of_each_process(tmp_path, *flags, f"--training.steps={steps}")
        assert alone == RESOLVED | {"meta model": 1}


def test_a_launcher_and_its_ranks_resolve_their_job_once_each(tmp_path):
    launcher, *ranks = calls_of_each_process(tmp_path, "--training.steps=1", NGPU="2")
    assert launcher == RESOLVED
    # The rank that the user sees prints the number of parameters.
    assert sorted(ranks, key=len) == [RESOLVED, RESOLVED | {"meta model": 1}]
