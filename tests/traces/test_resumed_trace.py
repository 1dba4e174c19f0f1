"""Tests of a trace that a resumed run continues."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from tests.support.synthetic_trace import (
    LOSS,
    file_of,
    loads_by_step,
    run_info,
    step_loads,
    write_run,
)
from titan_moe_lb.traces.batch_reader import END
from titan_moe_lb.traces.trace import (
    FILE_NAME,
    TraceReader,
    TraceWriter,
    last_step,
    read_trace,
)


def test_resumed_run_continues_the_file(tmp_path):
    info = run_info()
    write_run(tmp_path, info, 7)
    resumed = run_info(losses={"z_loss": 1.0}, pp=1, started="later")
    writer = TraceWriter(tmp_path, resumed)
    assert read_trace(tmp_path).steps.tolist() == [1, 2, 3, 4, 5, 6, 7], "nothing happens yet"
    again = loads_by_step(resumed, 9)
    for step in (5, 6, 7, 8):
        writer.write(step, again[step])
        assert read_trace(tmp_path).steps[-1] == step
    writer.close()
    trace = read_trace(tmp_path)
    assert trace.steps.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert trace.info.resumed_at == (5,) and trace.info.losses == {"z_loss": 1.0}
    assert {f.name for f in trace.info.columns if f.is_aux_loss} == {LOSS, "z_loss"}
    first = loads_by_step(info, 7)
    for step in range(1, 5):
        np.testing.assert_array_equal(trace.counts_SME[step - 1], first[step].counts_ME)
    for step in range(5, 9):
        np.testing.assert_array_equal(trace.counts_SME[step - 1], again[step].counts_ME)
    assert (
        np.isnan(trace.layer_columns["z_loss"][:4]).all()
        and np.isnan(trace.layer_columns[LOSS][4:]).all()
    )
    assert not np.isnan(trace.layer_columns[LOSS][:4]).any()
    assert not np.isnan(trace.layer_columns["z_loss"][4:]).any()


def test_a_resume_forgets_the_runs_that_it_cuts_off(tmp_path):
    """Rule A at steps 1 to 4, B at 5 and 6, then B again from step 3 on."""
    bias = dict.fromkeys((1, 2, 3, 4), "sign") | dict.fromkeys((5, 6), "quantile")
    for first, last in ((1, 4), (5, 6)):
        info = run_info(expert_bias=bias[first])
        writer = TraceWriter(tmp_path, info)
        for step in range(first, last + 1):
            writer.write(step, loads_by_step(info, 9)[step])
        writer.close()
    assert read_trace(tmp_path).info.balanced_since == 5
    info = run_info(expert_bias="quantile")
    writer = TraceWriter(tmp_path, info)
    for step in (3, 4):
        writer.write(step, loads_by_step(info, 9)[step])
    writer.close()
    found = read_trace(tmp_path).info
    assert (found.resumed_at, found.balanced_since) == ((3,), 3)


def test_a_live_reader_describes_the_run_that_goes_on(tmp_path):
    before, after = run_info(expert_bias="sign"), run_info(expert_bias="quantile")
    writer = TraceWriter(tmp_path, before)
    writer.write(1, loads_by_step(before, 9)[1])
    writer.close()
    reader = TraceReader(tmp_path)
    assert reader.read().info.expert_bias == "sign"
    writer = TraceWriter(tmp_path, after)
    writer.write(2, loads_by_step(after, 9)[2])
    writer.close()
    news = reader.read()
    assert (news.steps.tolist(), news.info.expert_bias, news.info.resumed_at) == (
        [2],
        "quantile",
        (2,),
    )


def test_resume_after_a_crash_drops_the_torn_step(tmp_path):
    info = run_info()
    file = write_run(tmp_path, info, 5) / FILE_NAME
    file.write_bytes(file.read_bytes()[: -7 - len(END)])
    (tmp_path / f"{FILE_NAME}.new").write_bytes(b"left by a killed resume")
    TraceWriter(tmp_path, info).write(8, next(step_loads(info, 1)))
    trace = read_trace(tmp_path)
    assert trace.steps.tolist() == [1, 2, 3, 4, 8] and trace.damage == ()
    assert not (tmp_path / f"{FILE_NAME}.new").exists()


@pytest.mark.parametrize("earlier, first_step", [(run_info(), 1), (run_info(4, 16), 3), (None, 3)])
def test_what_is_not_continued_is_kept_aside(earlier, first_step, tmp_path, caplog):
    file = tmp_path / FILE_NAME
    if earlier:
        write_run(tmp_path, earlier, 4)
    else:
        file.write_text("something of yours")
    before = file.read_bytes()
    info = run_info()
    with caplog.at_level(logging.WARNING):
        TraceWriter(tmp_path, info).write(first_step, next(step_loads(info, 1)))
    assert read_trace(tmp_path).steps.tolist() == [first_step]
    assert (tmp_path / f"{FILE_NAME}.old-1").read_bytes() == before
    (record,) = caplog.records
    assert f"{FILE_NAME}.old-1" in record.getMessage()


def test_resume_goes_on_in_the_file_whatever_it_cuts_off(tmp_path):
    """For each first step: the bytes before it stay, and what follows is as an unbroken run's."""
    info = run_info(2, 4)
    earlier, steps = loads_by_step(info, 6), loads_by_step(info, 8)
    _file, content, ends = file_of(tmp_path / "whole", info, 6)
    for cut, first in itertools.product((0, 5, len(content) - ends[5]), range(2, 8)):
        folder = tmp_path / f"{cut}-{first}"
        file = folder / FILE_NAME
        folder.mkdir()
        file.write_bytes(content[: len(content) - cut])
        inode = file.stat().st_ino
        writer = TraceWriter(folder, dataclasses.replace(info, pp=1, world_size=2))
        for step in range(first, 9):
            writer.write(step, steps[step])
        kept = min(first - 1, 5 if cut else 6)
        assert (
            file.stat().st_ino == inode and file.read_bytes()[: ends[kept]] == content[: ends[kept]]
        )
        assert not read_trace(file).ended
        writer.close()
        trace = read_trace(file)
        expected = [*range(1, kept + 1), *range(first, 9)]
        assert trace.steps.tolist() == expected and trace.ended and trace.damage == ()
        assert trace.info.resumed_at == (first,) and trace.info.pp == 1
        parts = [earlier] * kept + [steps] * (9 - first)
        counts_SME = np.stack([part[n].counts_ME for part, n in zip(parts, expected, strict=True)])
        np.testing.assert_array_equal(trace.counts_SME, counts_SME)
        with pa.OSFile(str(file)) as stream:
            table = pa.ipc.open_stream(stream).read_all()
        assert table["step"].to_pylist()[::2] == expected
        assert last_step(file) == 8


def test_a_run_resumed_twice_is_described_by_its_last_part(tmp_path):
    info, steps = run_info(2, 4), loads_by_step(run_info(2, 4), 9)
    for first, ranks in ((1, 4), (4, 8), (6, 16)):
        writer = TraceWriter(tmp_path, dataclasses.replace(info, world_size=ranks))
        for step in range(first, first + 4):
            writer.write(step, steps[step])
        writer.close()
    found = TraceReader(tmp_path).info
    assert found.world_size == 16 and found.resumed_at == (4, 6)
    assert read_trace(tmp_path).steps.tolist() == list(range(1, 10))


def test_training_survives_any_damage_to_the_trace_it_continues(tmp_path):
    info = run_info(2, 4)
    file = write_run(tmp_path, info, 3) / FILE_NAME
    content, load = file.read_bytes(), next(step_loads(info, 1))
    random = np.random.default_rng(1)
    for _ in range(300):
        array = np.frombuffer(content, dtype=np.uint8).copy()
        array[random.integers(0, len(array), size=2)] = random.integers(0, 256, size=2)
        file.write_bytes(array.tobytes())
        writer = TraceWriter(tmp_path, info)
        writer.write(4, load)
        writer.close()
        assert read_trace(file).steps[-1] == 4


ANOTHER = """
import logging, sys
from tests.support.synthetic_trace import run_info, step_loads
from titan_moe_lb.traces.trace import TraceWriter
logging.basicConfig(stream=sys.stdout, format="%(message)s")
writer = TraceWriter(sys.argv[1], run_info())
for step in (3, 4):
    writer.write(step, next(step_loads(run_info(), 1)))
writer.close()
"""


def test_second_run_that_writes_one_trace_is_one_warning(tmp_path):
    info = run_info()
    writer, steps = TraceWriter(tmp_path, info), loads_by_step(info, 5)
    for step in (1, 2, 3):
        writer.write(step, steps[step])
    size = (tmp_path / FILE_NAME).stat().st_size
    command = [sys.executable, "-c", ANOTHER, tmp_path]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.count("\n") == 1 and "dump_folder" in said and str(tmp_path / FILE_NAME) in said
    assert (tmp_path / FILE_NAME).stat().st_size == size
    writer.write(4, steps[4])
    writer.close()
    assert read_trace(tmp_path).steps.tolist() == [1, 2, 3, 4]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert not said and read_trace(tmp_path).info.resumed_at == (3,)
