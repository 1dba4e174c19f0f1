"""Tests of the console of runs that succeed, fail or are stopped, in real processes.

A run of one process starts as a user starts it; the others are forked.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading

import pytest
from torch.distributed import TCPStore

from tests.support.job_processes import (
    TINY,
    end,
    fork,
    last_step,
    read_to,
    run,
    start,
    working_in,
)
from titan_moe_lb.run import rank_processes
from titan_moe_lb.run.console.signals import ended_by
from titan_moe_lb.terminal.heartbeat import Heartbeat

LONG = [*TINY, "--training.steps=100000"]


def test_first_command_fits_one_screen_without_colour_and_the_rest_is_in_the_log(tmp_path):
    status, out, err = end(start(tmp_path, *TINY, "--training.steps=10"), tmp_path)
    assert status == 0 and err == "" and len(out) <= 40, (out, err)
    assert "\x1b" not in "".join(out)
    assert [line.split()[0] for line in out[:6]] == [
        *("model", "layout", "balancing", "data", "output", "start"),
    ]
    assert sum("step:" in line and "loss:" in line for line in out) == 10
    assert out[-1].startswith("done") and f"titan-moe-lb report {tmp_path}" in out[-1]
    log = tmp_path / "logs/rank0.log"
    assert str(log) in "".join(out)
    assert "Training completed" in log.read_text() and "\x1b" not in log.read_text()


@pytest.mark.parametrize(
    ("number", "status", "name"),
    [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGHUP, 129, "SIGHUP")],
    ids=["ctrl-c", "hangup"],
)
def test_a_signal_to_one_process_is_one_line(number, status, name, tmp_path):
    process = fork(tmp_path, *LONG)
    read_to(process, "step:  3")
    process.send_signal(number)
    found, _out, err = end(process, tmp_path)
    assert found == status and err.count("\n") == 1, err
    assert name in err and "no checkpoint" in err and last_step(err) >= 3
    assert str(tmp_path / "moe_load.arrow") in err


def test_stop_of_two_processes_names_what_is_saved(tmp_path):
    flags = ["--checkpoint.enable", "--checkpoint.interval=2"]
    process = fork(tmp_path, *LONG, *flags, NGPU="2")
    read_to(process, "step:  4")
    process.send_signal(signal.SIGTERM)
    status, _out, err = end(process, tmp_path)
    assert status == 143 and err.count("\n") == 1 and "SIGTERM" in err, err
    step = err.partition("checkpoint of step ")[2].split()[0]
    assert (tmp_path / f"checkpoint/step-{step}/.metadata").is_file()
    assert last_step(err) >= 3


def test_a_rank_that_is_killed_is_named_and_not_the_one_that_lost_it(tmp_path):
    process = fork(tmp_path, *LONG, NGPU="2")
    read_to(process, "step:  2")
    log = tmp_path / "logs/rank1.log"
    (second,) = working_in(log)
    second.kill()
    status, _out, err = end(process, tmp_path)
    assert status == 1 and err.count("\n") == 1, err
    assert "rank 1" in err and "SIGKILL" in err and str(log) in err and last_step(err)


@pytest.mark.parametrize("failure", ["bug", "checkpoint"])
def test_a_failure_is_one_line_and_its_traceback_is_in_the_log(failure, tmp_path):
    job = ["--module=tests.support.failing_jobs", "--config=tiny", "--training.steps=5"]
    status, out, err = end(fork(tmp_path, *job, FAILURE=failure), tmp_path)
    assert status == 1 and err.count("\n") == 1, err
    words = {"bug": "RuntimeError: a bug", "checkpoint": "ValueError: cut"}
    assert words[failure] in err and "no checkpoint" in err
    log = tmp_path / "logs/rank0.log"
    assert str(log) in err and "Traceback" not in "".join(out)
    assert "Traceback (most recent call last)" in log.read_text()


def test_a_dry_run_shows_the_balancing_it_would_train_with(tmp_path):
    """A subcommand of torchtitan at the end of the flags does not hide those of the dry run."""
    job = run(
        [sys.executable, "-m", "titan_moe_lb.cli", "train", *TINY, f"--dump_folder={tmp_path}"]
        + [
            "--model.aux_losses",
            '[{type = "z_loss", weight = 0.5, changes = [{step = 7, value = 0.25}]}]',
            "activation-checkpoint:full",
        ],
        COMM_MODE="fake_backend",
        NGPU="4",
    )
    out, _err = job.communicate(timeout=120)
    assert job.returncode == 0
    (balancing,) = [line for line in out.splitlines() if line.startswith("balancing")]
    assert "0.25" in balancing and "step 7" in balancing
    assert not (tmp_path / "moe_load.arrow").exists()


def meeting_port() -> int:
    """Choose a port below the range from which the system gives free ports (32768 and above)."""
    return 20000 + os.getpid() % 10000


def test_two_nodes_meet_and_only_the_one_that_knows_the_loss_shows_it(tmp_path):
    """One node uses an IPv6 address, so both do."""
    flags = ["--training.steps=2", "--parallelism.pipeline_parallel_degree=2"]
    model = {"MODULE": "deepseek_v3", "CONFIG": "deepseek_v3_tiny"}
    nodes = {"NNODES": "2", "NGPU": "1", "RDZV_ENDPOINT": f"[::1]:{meeting_port()}"}
    both = [fork(tmp_path, *flags, **model, **nodes, NODE_RANK=str(node)) for node in (0, 1)]
    first, second = (process.communicate(timeout=240) for process in both)
    assert [process.returncode for process in both] == [0, 0], (first, second)
    assert "loss" not in first[0] and "rank 1" in first[0]
    assert second[0].count("step:  2  loss:  ") == 1 and "seq load balancing loss: 1." in second[0]
    assert first[1] == second[1] == ""
    log = (tmp_path / "logs/rank0.log").read_text()
    assert "step:  2  grad_norm" in log and "loss: -" not in log


def test_a_second_node_that_never_comes_is_one_line(tmp_path):
    endpoint = f"localhost:{meeting_port()}"
    nodes = {"NNODES": "2", "NODE_RANK": "1", "NGPU": "1", "RDZV_ENDPOINT": endpoint}
    status, _out, err = end(fork(tmp_path, *TINY, **nodes, RDZV_TIMEOUT="1"), tmp_path)
    assert status == 1 and err.count("\n") == 1, err
    assert f"RDZV_ENDPOINT={endpoint}" in err and "RDZV_TIMEOUT=1" in err
    assert "Connection refused" in err


def test_a_meeting_point_with_a_stranger_or_with_too_few_nodes(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        monkeypatch.setenv("RDZV_ENDPOINT", f"127.0.0.1:{stranger.getsockname()[1]}")
        assert "port" in rank_processes._Meeting(sys.stderr, nodes=2)._seen()
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("RDZV_ENDPOINT", f"localhost:{store.port}")
    assert "NNODES" in rank_processes._Meeting(sys.stderr, nodes=2)._seen()


def test_a_heartbeat_repeats_until_its_end():
    said: list[int] = []
    twice = threading.Event()

    def what(seconds: int) -> str:
        said.append(seconds)
        if len(said) == 2:
            twice.set()
        return "still"

    with Heartbeat(lambda line: None, what, after=0.5) as heartbeat:
        assert twice.wait(30)
    heartbeat._thread.join(30)
    assert not heartbeat._thread.is_alive() and said[:2] == [0, 1]


def test_a_signal_is_handled_while_the_main_thread_is_busy():
    heard: list[signal.Signals] = []
    before = signal.getsignal(signal.SIGTERM)
    done = threading.Event()

    def stop(number: signal.Signals) -> None:
        heard.append(number)
        done.set()

    with ended_by(stop):
        os.kill(os.getpid(), signal.SIGTERM)
        assert done.wait(5)
    assert heard == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) == before


NEVER_ENDS = """
import threading
from titan_moe_lb.run.console.signals import ended_by
with ended_by(lambda number: print(number.name, flush=True) or threading.Event().wait()):
    print("ready", flush=True)
    threading.Event().wait()
"""


def test_a_second_signal_kills_what_the_first_does_not_end():
    """One that follows at once is the same: a scheduler signals a launcher and its ranks."""
    process = run([sys.executable, "-c", NEVER_ENDS])
    read_to(process, "ready")
    process.send_signal(signal.SIGTERM)
    read_to(process, "SIGTERM")
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == -signal.SIGTERM
    process.communicate()


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ended_by(lambda number: pytest.fail(number.name)):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
