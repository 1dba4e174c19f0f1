"""Tests of the live view of a growing trace."""

from __future__ import annotations

import dataclasses
import fcntl
import io
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time

import numpy as np
import pytest
from rich.console import Console

from tests.support.synthetic_trace import run_info, step_loads, write_run
from titan_moe_lb import cli
from titan_moe_lb.commands.watch.follower import Follower, in_words
from titan_moe_lb.commands.watch.frame import frame
from titan_moe_lb.commands.watch.glyphs import ASCII, UNICODE, glyphs_of
from titan_moe_lb.traces.columns import Column
from titan_moe_lb.traces.step_load import StepLoad
from titan_moe_lb.traces.trace import TraceWriter, read_trace

BARS = UNICODE.bars


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


def test_bars_and_numbers_are_those_of_the_step(tmp_path):
    info = run_info(1, 8, 1)
    # 8 experts, balanced 100: dead, half, balanced, twice, and four times the load.
    counts_ME = np.array([[0, 50, 100, 200, 400, 50, 0, 0]])
    load = StepLoad(
        layers=(1,),
        counts_ME=counts_ME,
        layer_columns={
            "seq_load_balancing_loss": np.array([1.25]),
            "avg_overload_factor": np.array([1.5]),
            "max_overload_factor": np.array([2.5]),
            "bias_range": np.array([0.0625]),
        },
        step_columns={
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
    assert "step 17" in text and "dead experts 3 of " in text
    assert "seq load balancing loss 1.2500" in text
    assert "mean 1.500  max 2.500  cumulative 1.750" in text
    assert (
        "learning  loss 3.5000  grad norm 0.75  tps 12,346  0.5 s/step  bias range 0.0625" in text
    )
    assert "mean 3.000  worst 3.000 (layer 1)" in text


def test_hostile_names_do_not_reach_the_terminal(tmp_path):
    columns = (Column("\x1b[2Jgone", is_aux_loss=True),)
    info = run_info(1, 8, 1, model="\x1b]0;title\x07", columns=columns, forced_routing="a\nb")
    load = StepLoad(
        layers=(1,), counts_ME=np.ones((1, 8)), layer_columns={columns[0].name: np.array([2.0])}
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


class Terminal:
    """Program in its own terminal of 80 columns and 24 lines."""

    def __init__(self, folder, **environment):
        self.controller, self.terminal = pty.openpty()
        self.resize(24, 80)
        self.settings = termios.tcgetattr(self.terminal)
        self.seen, self.read = b"", 0
        kept = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "titan_moe_lb.cli", "watch", str(folder)],
            stdin=self.terminal,
            stdout=self.terminal,
            stderr=self.terminal,
            env={**kept, "TERM": "xterm-256color", "LANG": "C.UTF-8", **environment},
            # A suite that a shell runs in the background ignores Ctrl-C, and so would its children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def __enter__(self):
        return self

    def __exit__(self, *_exception):
        self.process.kill()
        self.process.wait()
        os.close(self.controller)
        os.close(self.terminal)

    def resize(self, lines, columns):
        fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("4H", lines, columns, 0, 0))

    def is_readable(self, seconds):
        waiting = select.poll()
        waiting.register(self.controller, select.POLLIN)
        return bool(waiting.poll(1000 * seconds))

    def read_until(self, text, seconds=20):
        """Read the output since the last call, up to and including ``text``."""
        deadline = time.monotonic() + seconds
        while text not in self.seen[self.read :] and time.monotonic() < deadline:
            if self.is_readable(0.5):
                self.seen += os.read(self.controller, 65536)
        assert text in self.seen[self.read :], self.seen[-2000:]
        start, self.read = self.read, self.seen.index(text, self.read) + len(text)
        return self.seen[start : self.read]

    def end(self):
        """Return the status, and check that screen, cursor and settings of the terminal are
        restored."""
        status = self.process.wait(timeout=20)
        while self.is_readable(0):
            self.seen += os.read(self.controller, 65536)
        assert self.seen.rindex(b"\x1b[?1049l") > self.seen.rindex(b"\x1b[?1049h")
        assert self.seen.rindex(b"\x1b[?25h") > self.seen.rindex(b"\x1b[?25l")
        assert termios.tcgetattr(self.terminal) == self.settings
        assert b"Traceback" not in self.seen
        return status


def test_waits_then_follows_a_resized_terminal_until_q(tmp_path):
    """The run starts after the program."""
    with Terminal(tmp_path / "run") as terminal:
        terminal.read_until(b"waiting for")
        terminal.read_until(b"q quits")
        write_run(tmp_path / "run", run_info(), 5)
        terminal.read_until(b"step 5")
        terminal.read_until(b"quits")
        terminal.resize(24, 50)
        # A picture of the old size may be on its way.
        for _ in range(10):
            picture = terminal.read_until(b"quits").rpartition(b"\x1b[H")[2].decode()
            lines = re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", picture).splitlines()
            if max(map(len, lines)) <= 50:
                break
        assert {len(line) for line in lines[:-1]} == {50}
        os.write(terminal.controller, b"xq")
        assert terminal.end() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_terminal_is_put_back_when_a_signal_ends_it(tmp_path, number):
    with Terminal(write_run(tmp_path, run_info(), 5)) as terminal:
        terminal.read_until(b"quits")
        assert termios.tcgetattr(terminal.terminal) != terminal.settings
        terminal.process.send_signal(number)
        assert terminal.end() == 128 + number


def test_terminal_that_knows_ascii_alone_and_no_colour(tmp_path):
    info = run_info(model="d\N{LATIN SMALL LETTER E WITH ACUTE}ep")
    with Terminal(write_run(tmp_path, info, 5), LANG="C", NO_COLOR="1") as terminal:
        drawn = terminal.read_until(b"quits")
    assert drawn.isascii() and b"d?ep" in drawn and b"= 1 " in drawn
    styles = re.findall(rb"\x1b\[([0-9;]*)m", drawn)
    assert not {code for style in styles for code in style.split(b";")} & {b"38", b"31", b"33"}


def test_encoding_that_knows_no_bars():
    for encoding, glyphs in (("utf-8", UNICODE), ("iso-8859-1", ASCII), ("ascii", ASCII)):
        console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        assert glyphs_of(console) is glyphs


def test_run_whose_next_step_is_far_too_late_looks_dead(tmp_path):
    """A run that logs every 5 steps of about 0.5 s is dead after a minute; a run of 10 s a step
    later."""
    info, folder = run_info(), tmp_path
    running = TraceWriter(folder, info)
    for index, load in enumerate(step_loads(info, 9)):
        running.write(1 + 5 * index, load)
    follower = Follower(folder)
    follower.look()
    seconds_S = read_trace(folder).step_columns["step_seconds"]
    assert follower.seconds_between_steps == pytest.approx(5 * np.median(seconds_S[1:]))
    assert in_words(follower.age(follower.written + 12)) == "12 s"
    assert follower.age(follower.written - 5) == 0, "of another clock"
    assert follower.end(follower.written + 59) is None
    assert "no step for 3 min, it was one every" in follower.end(follower.written + 180)
    os.utime(folder / "moe_load.arrow", (0, time.time() - 7200))
    follower = Follower(folder)
    follower.look()
    assert re.search(r"^no step for 2 h, .* ended or is dead$", drawn(follower, 80), re.MULTILINE)

    slow = tmp_path / "slow"
    writer, steps = TraceWriter(slow, info), list(step_loads(info, 4))
    follower = Follower(slow)
    for step, load in enumerate(steps, start=1):
        own = load.step_columns | {"step_seconds": 10.0}
        writer.write(step, dataclasses.replace(load, step_columns=own))
        follower.look()  # one at a time, as it is followed
    assert follower.seconds_between_steps == 10
    assert follower.end(follower.written + 99) is None
    assert follower.end(follower.written + 101)


def test_rest_of_the_package_agrees_on_the_last_step(tmp_path):
    folder = write_run(tmp_path, run_info(), 9)
    follower = Follower(folder)
    follower.look()
    trace = read_trace(folder)
    np.testing.assert_array_equal(follower.load.counts_ME, trace.counts_SME[-1])
    violation_SM = trace.counts_SME.max(axis=2) / trace.counts_SME.mean(axis=2) - 1
    np.testing.assert_allclose(list(follower.max_violations.values()), violation_SM.mean(axis=1))


def test_end_of_a_run_is_said_and_a_long_run_has_its_whole_course(tmp_path):
    """Steps that were never in memory are in the course: spread over the run, the last ones dense."""
    info = run_info()
    writer, loads = TraceWriter(tmp_path, info), dict(enumerate(step_loads(info, 1000), start=1))
    for step, load in loads.items():
        writer.write(step, load)
    follower = Follower(tmp_path)
    follower.look()
    assert not follower.ended and "ended" not in drawn(follower, 80)
    steps = sorted(follower.max_violations)
    assert steps[0] == 1 and steps[-200:] == list(range(801, 1001)) and len(steps) < 300
    assert max(np.diff(steps)) < 60
    for step, violation in follower.max_violations.items():
        counts_ME = loads[step].counts_ME
        expected = (counts_ME.max(axis=1) / counts_ME.mean(axis=1) - 1).mean()
        assert violation == pytest.approx(expected)
    writer.close()
    assert not follower.look() and follower.ended
    assert "the run has ended" in drawn(follower, 80)
    TraceWriter(tmp_path, info).write(901, loads[1])
    assert follower.look() and follower.step == 901 and not follower.ended
    assert max(follower.max_violations) == 901


def test_a_clock_that_is_set_makes_no_run_late(tmp_path, monkeypatch):
    info = run_info()
    TraceWriter(tmp_path, info).write(1, next(step_loads(info, 1)))
    follower = Follower(tmp_path)
    follower.look()
    now = time.time()
    for jump in (-7200, 7200):
        monkeypatch.setattr(time, "time", lambda jump=jump: now + jump)
        assert follower.age() < 60 and follower.end() is None
