"""Tests of a damaged trace: every undamaged step is read, and no damage causes a traceback."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.synthetic_trace import (
    file_of,
    rewrite,
    run_info,
    step_loads,
    without_checksums,
    write_run,
)
from titan_moe_lb import cli
from titan_moe_lb.commands.diagnose.checks import findings
from titan_moe_lb.errors import JobError
from titan_moe_lb.traces.batch_reader import END
from titan_moe_lb.traces.run_info import FORMAT_VERSION
from titan_moe_lb.traces.trace import (
    FILE_NAME,
    TraceWriter,
    last_step,
    read_trace,
)


def test_cut_at_every_byte_gives_whole_steps_or_one_line(tmp_path):
    _file, content, (_head, *ends) = file_of(tmp_path / "run", run_info(2, 4, losses={}), 2)
    cut = tmp_path / "cut.arrow"
    with cut.open("wb", buffering=0) as growing:
        for size in range(len(content) + 1):
            growing.write(content[max(size - 1, 0) : size])
            whole = sum(end <= size for end in ends)
            if not whole:
                with pytest.raises(JobError) as error:
                    read_trace(cut)
                assert "cut.arrow" in str(error.value) and "\n" not in str(error.value)
                continue
            trace = read_trace(cut)
            assert trace.steps.tolist() == list(range(1, whole + 1))
            assert len(trace.damage) == (size not in ends)
            if trace.damage:
                assert f"step {whole}" in trace.damage[0]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    file, content, ends = file_of(tmp_path_factory.mktemp("sound"), run_info(2, 4), 6)
    return read_trace(file), content, ends


DAMAGE = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True), st.integers(1, 400), st.none() | st.binary(min_size=1)
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=300, deadline=None)
@given(damage=DAMAGE)
def test_every_undamaged_step_is_read(sound, damage, tmp_path_factory):
    """A few places have zeros (None) or other bytes; a step is read unless one of its bytes
    differs."""
    trace, content, ends = sound
    damaged = bytearray(content)
    for place, length, new in damage:
        start = ends[0] + int(place * (len(content) - ends[0]))
        length = min(length, len(content) - start)
        damaged[start : start + length] = ((new or b"\0") * length)[:length]
    file = tmp_path_factory.mktemp("damaged") / FILE_NAME
    file.write_bytes(damaged)
    spans = list(zip(ends, ends[1:], strict=False))
    whole = [damaged[a:b] == content[a:b] for a, b in spans]
    if not any(whole):
        with pytest.raises(JobError):
            read_trace(file)
        return
    found = read_trace(file)
    assert found.steps.tolist() == [step for step, ok in enumerate(whole, start=1) if ok]
    np.testing.assert_array_equal(found.counts_SME, trace.counts_SME[whole])
    for name, values_SM in found.layer_columns.items():
        np.testing.assert_array_equal(values_SM, trace.layer_columns[name][whole])
    last = max(step for step, ok in enumerate(whole) if ok)
    gaps = sum(not ok and (i == 0 or whole[i - 1]) for i, ok in enumerate(whole[: last + 1]))
    assert len(found.damage) == gaps + (not whole[-1])


@settings(max_examples=200, deadline=None)
@given(where=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255))))
def test_damaged_beginning_is_one_line_or_none(sound, where, tmp_path_factory):
    _trace, content, ends = sound
    damaged = bytearray(content)
    for place, new in where:
        damaged[int(place * ends[0])] = new
    file = tmp_path_factory.mktemp("damaged") / FILE_NAME
    file.write_bytes(damaged)
    try:
        found = read_trace(file)
        assert found.steps.tolist() == [1, 2, 3, 4, 5, 6]
    except JobError as error:
        assert "\n" not in str(error)


def test_damage_to_a_trace_without_checksums_is_never_a_traceback(tmp_path):
    file = write_run(tmp_path, run_info(2, 4), 4) / FILE_NAME
    rewrite(file, without_checksums(file)[0])
    content, random = file.read_bytes(), np.random.default_rng(0)
    behind = 0
    for _ in range(300):
        array = np.frombuffer(content, dtype=np.uint8).copy()
        where = random.integers(0, len(array), size=random.integers(1, 4))
        array[where] = random.integers(0, 256, size=len(where))
        file.write_bytes(array.tobytes())
        try:
            trace = read_trace(file)
            behind += len(trace.steps) == 3 and trace.steps[-1] == 4
        except JobError as error:
            assert "\n" not in str(error)
    assert behind, "steps behind the damage are read here too"


DESCRIPTION = json.loads(run_info().metadata()[b"titan_moe_lb"])


@pytest.mark.parametrize("name", DESCRIPTION)
def test_description_that_is_none_is_one_line(name, tmp_path):
    file = write_run(tmp_path, run_info(), 6) / FILE_NAME
    content = file.read_bytes()
    for value in (
        None,
        0,
        -1,
        "x",
        [],
        [[]],
        {},
        {"a": [1]},
        1e308,
        True,
        2**70,
        [2**40],
        [{"name": "layer"}],
    ):
        file.write_bytes(content)
        rewrite(file, without_checksums(file, lambda table, v=value: table.update({name: v}))[0])
        try:
            trace = read_trace(file)
            assert trace.info.layout and trace.info.model_name
            findings(trace)
        except JobError as error:
            assert "\n" not in str(error)


def test_kill_at_every_byte_of_the_end_loses_no_step(tmp_path):
    file = write_run(tmp_path, run_info(2, 4), 3) / FILE_NAME
    content = file.read_bytes()
    assert content.endswith(END) and read_trace(file).ended
    for cut in range(1, len(END) + 1):
        file.write_bytes(content[:-cut])
        trace = read_trace(file)
        assert trace.steps.tolist() == [1, 2, 3] and not trace.ended
        assert last_step(file) == 3


WRITE_FOREVER = """
import itertools, sys
from tests.support.synthetic_trace import run_info, step_loads
from titan_moe_lb.traces.trace import TraceWriter
info = run_info(8, 64)
loads = itertools.cycle(list(step_loads(info, 20)))
writer = TraceWriter(sys.argv[1], info)
for step, load in enumerate(loads, start=1):
    writer.write(step, load)
    print(step, flush=True)
"""


def test_killed_run_is_reported_up_to_its_last_step(tmp_path, capsys):
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE_FOREVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    said = [process.stdout.readline() for _ in range(200)]
    process.send_signal(signal.SIGKILL)
    last_said = int([*said, *process.stdout.read().splitlines()][-1])
    process.wait()
    cli.main(["report", str(tmp_path)])
    trace = read_trace(tmp_path)
    # A step is announced after it was handed over, so none of those is lost.
    assert len(trace.steps) in (last_said, last_said + 1)
    assert trace.steps.tolist() == list(range(1, len(trace.steps) + 1))
    assert f"{len(trace.steps)} steps" in capsys.readouterr().out


def foreign_stream(path):
    table = pa.table({"step": [1]})
    with pa.ipc.new_stream(str(path), table.schema) as stream:
        stream.write_table(table)


def newer(path):
    info = dataclasses.replace(run_info(), format_version=FORMAT_VERSION + 1)
    TraceWriter(path, info).write(1, next(step_loads(info, 1)))


def without_choices(path):
    """Make a layer whose tokens choose no expert."""
    info = run_info()
    few = (0, *[info.top_k] * (len(info.layers) - 1))
    info = dataclasses.replace(info, top_k_by_layer=few)
    TraceWriter(path, info).write(1, next(step_loads(info, 1)))


UNREADABLE = {
    "empty": lambda path: path.touch(),
    "text": lambda path: path.write_text("step,loss\n1,2\n" * 50),
    "zeros": lambda path: path.write_bytes(bytes(4096)),
    "foreign": foreign_stream,
    "newer": newer,
    "no choices": without_choices,
    "missing": lambda path: None,
    "folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("case", UNREADABLE)
@pytest.mark.parametrize("command", ["report", "watch"])
def test_what_is_no_trace_is_one_line_and_status_2(case, command, tmp_path, capsys):
    path = tmp_path / ("thing" if case == "folder" else "thing.arrow")
    UNREADABLE[case](path)
    with pytest.raises(SystemExit) as stop:
        cli.main([command, str(path)] + ["--once"] * (command == "watch"))
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("titan_moe_lb: error: ") and said.count("\n") == 1
    assert str(path) in said
