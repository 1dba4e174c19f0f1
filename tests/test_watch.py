"""The live view: what it shows of a growing trace."""

from __future__ import annotations

import dataclasses
import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from rich.console import Console

from tests.synthetic_trace import run_info, step_loads, write_run
from titan_moe_lb import cli
from titan_moe_lb.traces.figure import Figure
from titan_moe_lb.traces.step_load import StepLoad
from titan_moe_lb.traces.trace import TraceWriter, read_trace
from titan_moe_lb.watch.follower import Follower
from titan_moe_lb.watch.frame import BARS, frame


def drawn(follower, width, most_layers=None):
    out = io.StringIO()
    Console(file=out, width=width).print(frame(follower, width, most_layers))
    return out.getvalue()


def test_follows_a_run_that_grows_and_is_resumed(tmp_path):
    info = run_info()
    loads = dict(enumerate(step_loads(info, 12), start=1))
    follower = Follower(tmp_path / "run")
    assert not follower.look(), "there is no run yet"
    writer = TraceWriter(tmp_path / "run", info)
    assert not follower.look(), "it has written no step yet"
    writer.write(1, loads[1])
    assert follower.look() and follower.step == 1
    assert not follower.look(), "nothing new"
    for step in (2, 3, 4, 5):
        writer.write(step, loads[step])
    assert follower.look() and follower.step == 5 and len(follower.max_violations) == 5
    resumed = TraceWriter(tmp_path / "run", info)
    resumed.write(4, loads[9])
    assert follower.look() and follower.step == 4
    np.testing.assert_array_equal(follower.load.counts_ME, loads[9].counts_ME)
    assert len(follower.max_violations) == 4
    resumed.write(5, loads[10])
    assert follower.look() and follower.step == 5


@pytest.mark.parametrize("width", [40, 80, 160])
@pytest.mark.parametrize("shape", [(4, 8, 2), (61, 256, 8)])
def test_fits_the_terminal(width, shape, tmp_path):
    follower = Follower(write_run(tmp_path, run_info(*shape), 3))
    follower.look()
    lines = drawn(follower, width).splitlines()
    assert max(map(len, lines)) <= width
    strips = [line for line in lines if re.match(r"\s*\d+ +[" + BARS + "·]", line)]
    assert [int(line.split()[0]) for line in strips] == list(range(1, shape[0] + 1))
    shown = drawn(follower, width, most_layers=5)
    assert len(re.findall(r"^\s*\d+  [" + BARS + "·]", shown, re.MULTILINE)) == min(5, shape[0])


def test_bars_and_figures_are_those_of_the_step(tmp_path):
    info = run_info(1, 8, 1)
    # 8 experts, balanced 100: dead, half, balanced, twice, and four times the load.
    counts_ME = np.array([[0, 50, 100, 200, 400, 50, 0, 0]])
    load = StepLoad(
        layers=(1,),
        counts_ME=counts_ME,
        figures={
            "seq_load_balancing_loss": np.array([1.25]),
            "avg_overload_factor": np.array([1.5]),
            "max_overload_factor": np.array([2.5]),
            "bias_range": np.array([0.0625]),
        },
        step_figures={
            "max_cum_overload_factor": 1.75,
            "loss": 3.5,
            "grad_norm": 0.75,
            "tokens_per_second": 12345.6,
            "step_seconds": 0.5,
        },
    )
    TraceWriter(tmp_path, info).write(17, load)
    follower = Follower(tmp_path)
    follower.look()
    text = drawn(follower, 80)
    strip = "".join(8 * bar for bar in "·▂▄▆█▂··")
    assert re.search(rf"^   1  {strip} +3\.00$", text, re.MULTILINE)
    assert "step 17" in text and "dead experts 3" in text
    assert "seq_load_balancing_loss 1.2500" in text
    assert "mean 1.500  max 2.500  cumulative 1.750" in text
    assert (
        "learning  loss 3.5000  grad norm 0.75  tps 12,346  0.5 s/step  bias range 0.0625" in text
    )
    assert "mean 3.000  worst 3.000 (layer 1)" in text


def test_hostile_names_do_not_reach_the_terminal(tmp_path):
    figures = (Figure("\x1b[2Jgone", is_aux_loss=True),)
    info = run_info(1, 8, 1, model="\x1b]0;title\x07", figures=figures, forced_routing="a\nb")
    load = StepLoad(
        layers=(1,), counts_ME=np.ones((1, 8)), figures={figures[0].name: np.array([2.0])}
    )
    TraceWriter(tmp_path, info).write(1, load)
    follower = Follower(tmp_path)
    follower.look()
    text = drawn(follower, 80)
    assert "gone 2.0000" in text and not {"\x1b", "\x07"} & set(text)
    assert "learning" not in text and "overload" not in text, "what is not known is not shown"


def test_columns_that_stand_for_many_show_the_most_uneven(tmp_path):
    info = run_info(1, 256, 8)
    counts_ME = np.full((1, 256), 100)
    counts_ME[0, 130], counts_ME[0, 200] = 0, 1600
    load = dataclasses.replace(next(step_loads(info, 1)), counts_ME=counts_ME)
    TraceWriter(tmp_path, info).write(1, load)
    follower = Follower(tmp_path)
    follower.look()
    (strip,) = re.findall(r"^   1  ([^ ]+)", drawn(follower, 80), re.MULTILINE)
    assert len(strip) == 64 and strip[130 // 4] == "·" and strip[200 // 4] == "█"
    assert set(strip) == {"▄", "·", "█"}


def test_once_prints_one_frame(tmp_path, capsys):
    write_run(tmp_path, run_info(), 5)
    cli.main(["watch", str(tmp_path), "--once"])
    assert "step 5" in capsys.readouterr().out


def test_waits_with_one_line_then_follows(tmp_path):
    """In a terminal of its own: the run appears after the program."""
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "titan_moe_lb.cli", "watch", str(tmp_path / "run")],
        stdout=terminal,
        stderr=terminal,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"},
        # A suite that a shell runs in the background ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(terminal)
    seen = b""

    def read_until(text, seconds=20):
        nonlocal seen
        deadline = time.monotonic() + seconds
        while text not in seen and time.monotonic() < deadline:
            if select.select([controller], [], [], 0.5)[0]:
                seen += os.read(controller, 65536)
        assert text in seen, seen[-2000:]

    read_until(b"waiting for")
    write_run(tmp_path / "run", run_info(), 5)
    read_until(b"step 5")
    process.send_signal(2)
    assert process.wait(timeout=20) == 130
    os.close(controller)
    assert b"Traceback" not in seen


def test_rest_of_the_package_agrees_on_the_last_step(tmp_path):
    folder = write_run(tmp_path, run_info(), 9)
    follower = Follower(folder)
    follower.look()
    trace = read_trace(folder)
    np.testing.assert_array_equal(follower.load.counts_ME, trace.counts_SME[-1])
    violation_SM = trace.counts_SME.max(axis=2) / trace.counts_SME.mean(axis=2) - 1
    np.testing.assert_allclose(follower.max_violations, violation_SM.mean(axis=1))
