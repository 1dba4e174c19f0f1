"""Tests of the trace file: what is written comes back, in any reader."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.synthetic_trace import (
    COLUMNS,
    LOSS,
    loads_by_step,
    rewrite,
    run_info,
    step_loads,
    without_checksums,
    write_run,
)
from titan_moe_lb.errors import JobError
from titan_moe_lb.traces.columns import Column
from titan_moe_lb.traces.step_load import StepLoad
from titan_moe_lb.traces.trace import (
    FILE_NAME,
    MICRO_BATCH,
    TraceReader,
    TraceWriter,
    read_trace,
)

SUMMARIES, BOOLEAN = ["mean", "max", "sum"], st.booleans()


NUMBERS = st.floats(allow_infinity=False)


@st.composite
def runs(draw):
    """Generate runs with columns of any name, of which some are in no load."""
    num_layers, num_experts = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    names = st.text(min_size=1, max_size=8).filter(lambda n: n not in ("step", "layer", "counts"))
    columns = tuple(
        Column(name, draw(st.sampled_from(["layer", "step"])), draw(st.sampled_from(SUMMARIES)))
        for name in draw(st.sets(names, max_size=4))
    )
    odd = {"forced_routing": 'HotRank(rank=3, "half")', "schedule": None, "resumed_at": (5, 9)}
    info = run_info(num_layers, num_experts, 1, columns=columns, **odd)
    counts = st.lists(
        st.integers(0, 2**62), min_size=num_layers * num_experts, max_size=num_layers * num_experts
    )

    def per_layer():
        return np.array(draw(st.lists(NUMBERS, min_size=num_layers, max_size=num_layers)))

    loads = [
        StepLoad(
            layers=info.layers,
            counts_ME=np.array(draw(counts), dtype=np.int64).reshape(num_layers, num_experts),
            layer_columns={
                f.name: per_layer() for f in columns if f.per == "layer" and draw(BOOLEAN)
            },
            step_columns={f.name: draw(NUMBERS) for f in columns if f.per == "step"},
        )
        for _ in range(draw(st.integers(1, 3)))
    ]
    steps = sorted(draw(st.sets(st.integers(0, 2**40), min_size=3, max_size=3)))
    return info, steps[: len(loads)], loads


@settings(max_examples=60, deadline=None)
@given(run=runs())
def test_what_is_written_comes_back(run, tmp_path_factory):
    info, steps, loads = run
    folder = tmp_path_factory.mktemp("run")
    writer = TraceWriter(folder, info)
    for step, load in zip(steps, loads, strict=True):
        writer.write(step, load)
    writer.close()
    trace = read_trace(folder)
    assert trace.info == info and trace.damage == ()
    assert trace.steps.tolist() == steps
    for index, load in enumerate(loads):
        found = trace.load(index)
        np.testing.assert_array_equal(found.counts_ME, load.counts_ME)
        for column in info.columns:
            if column.per == "step":
                expected = load.step_columns[column.name]
                np.testing.assert_array_equal(found.step_columns[column.name], expected)
                np.testing.assert_array_equal(trace.over_steps(column.name)[index], expected)
            else:
                expected = load.layer_columns.get(column.name, np.full(len(info.layers), np.nan))
                np.testing.assert_array_equal(found.layer_columns[column.name], expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@given(st.lists(st.lists(st.floats(-1e9, 1e9) | st.just(np.nan), min_size=3, max_size=3)))
def test_layers_are_summarised_as_declared(rows):
    values_SM = np.array(rows).reshape(-1, 3)
    empty_S = np.isnan(values_SM).all(axis=1)
    for summary, function in (("mean", np.nanmean), ("max", np.nanmax), ("sum", np.nansum)):
        expected_S = np.where(empty_S, np.nan, function(values_SM, axis=1))
        found_S = Column("any", summary=summary).over_layers(values_SM)
        np.testing.assert_allclose(found_S, expected_S, rtol=1e-9, atol=1e-6)


def test_column_that_is_not_declared_is_refused(tmp_path):
    load = dataclasses.replace(next(step_loads(run_info(), 1)), step_columns={"mine": 1.0})
    with pytest.raises(ValueError, match="'mine'"):
        TraceWriter(tmp_path, run_info()).write(1, load)


@pytest.mark.parametrize("name", ["counts", "loss"])
def test_column_with_the_name_of_another_column_is_refused(name, tmp_path):
    columns = (*COLUMNS, Column(name))
    with pytest.raises(JobError, match=f"'{name}'"):
        TraceWriter(tmp_path, run_info(columns=columns))


def test_any_reader_of_arrow_can_open_it(tmp_path):
    info = run_info(2, 4)
    write_run(tmp_path, info, 3)
    with pa.OSFile(str(tmp_path / FILE_NAME)) as file:
        table = pa.ipc.open_stream(file).read_all()
    assert table["step"].to_pylist() == [1, 1, 2, 2, 3, 3]
    assert table["layer"].to_pylist() == [1, 2] * 3
    assert table.schema.field("counts").type == pa.list_(pa.int64(), 4)
    routed = info.global_batch_size * info.seq_len * info.top_k
    assert {sum(counts) for counts in table["counts"].to_pylist()} == {routed}
    first = next(step_loads(info, 3))
    assert table[LOSS].to_pylist()[:2] == first.layer_columns[LOSS].tolist()


def test_a_stream_that_pyarrow_closed_is_whole(tmp_path, caplog):
    file = write_run(tmp_path, run_info(), 3) / FILE_NAME
    counts_SME = read_trace(file).counts_SME
    rewrite(file, without_checksums(file)[0])
    trace = read_trace(file)
    assert trace.damage == ()
    np.testing.assert_array_equal(trace.counts_SME, counts_SME)
    writer = TraceWriter(tmp_path, run_info())
    writer.write(4, next(step_loads(run_info(), 1)))
    writer.close()
    assert read_trace(file).steps.tolist() == [1, 2, 3, 4] and not caplog.messages
    file.write_bytes(file.read_bytes()[:-1])
    assert "last 7 bytes" in read_trace(file).damage[0]


def test_what_a_newer_writer_adds_is_kept(tmp_path):
    file = write_run(tmp_path, run_info(), 3) / FILE_NAME

    def change(table):
        table["colour"] = "blue"
        table["columns"][0]["unit"] = "nats"

    batches, metadata = without_checksums(file, change)
    mine = pa.array(np.arange(4.0))
    rewrite(
        file,
        [
            batch.append_column("theirs", mine)
            .append_column("note", pa.array(["x"] * 4))
            .replace_schema_metadata(metadata)
            for batch in batches
        ],
    )
    trace = read_trace(file)
    assert trace.layer_columns["theirs"].tolist() == [[0.0, 1.0, 2.0, 3.0]] * 3
    assert trace.over_steps("theirs").tolist() == [1.5] * 3
    TraceWriter(tmp_path, run_info()).write(3, next(step_loads(run_info(), 1)))
    table = pa.ipc.open_stream(file.read_bytes()).read_all()
    assert table["note"].to_pylist() == ["x"] * 8 + [None] * 4
    assert np.isnan(read_trace(file).layer_columns["theirs"][2]).all()


def test_counts_of_micro_batches_are_there_where_asked_for(tmp_path):
    """Counts exist for the steps that recorded one; a step with counts of only some layers is
    damaged."""
    info = run_info(2, 4)
    writer, single = TraceWriter(tmp_path, info), np.arange(8).reshape(2, 4)
    for step, load in enumerate(step_loads(info, 3), start=1):
        counts = None if step == 2 else step * single
        writer.write(step, dataclasses.replace(load, micro_batch_counts_ME=counts))
    file = tmp_path / FILE_NAME
    assert read_trace(file).micro_batch_counts_SME.shape == (0, 2, 4)
    whole = read_trace(file, micro_batches=True)
    np.testing.assert_array_equal(whole.micro_batch_counts_SME, [single, 3 * single])
    np.testing.assert_array_equal(whole.counts_SME, read_trace(file).counts_SME)
    batches, _metadata = without_checksums(file)
    place = batches[0].schema.get_field_index(MICRO_BATCH)
    halved = pa.array([single[0].tolist(), None], batches[0].schema.field(place).type)
    rewrite(file, [batch.set_column(place, MICRO_BATCH, halved) for batch in batches])
    assert read_trace(file).steps.tolist() == [1, 2, 3]
    with pytest.raises(JobError, match="holds no whole step"):
        read_trace(file, micro_batches=True)


def test_million_layer_steps_in_seconds(tmp_path):
    info, num_steps = run_info(50, 16, columns=COLUMNS[:4]), 20_000
    writer, load = TraceWriter(tmp_path, info), next(step_loads(info, 1))
    load = dataclasses.replace(
        load, layer_columns=dict(list(load.layer_columns.items())[1:]), step_columns={}
    )
    writer.write(1, load)
    file = tmp_path / FILE_NAME
    size = file.stat().st_size
    writer.write(2, load)
    with file.open("r+b") as stream:
        stream.seek(size)
        message = stream.read()
        stream.write(message * (num_steps - 2))
    start = time.process_time()
    trace = read_trace(file)
    seconds = time.process_time() - start
    assert trace.counts_SME.shape == (num_steps, 50, 16)
    assert seconds < 20, f"{seconds:.1f} s for a million layer-steps"


def test_two_models_are_refused_by_both_names(tmp_path):
    one = read_trace(write_run(tmp_path / "one", run_info(4, 8), 2))
    other = read_trace(write_run(tmp_path / "other", run_info(4, 16, model="qwen3"), 2))
    with pytest.raises(JobError) as error:
        one.info.require_same_model(other.info, str(one.path), str(other.path))
    assert "deepseek_v3 debugmodel (4 MoE layers, 8 experts, top 2)" in str(error.value)
    assert "qwen3 debugmodel (4 MoE layers, 16 experts, top 2)" in str(error.value)
    one.info.require_same_model(one.info, "here", "there")


ELSEWHERE = """
import sys
from tests.support.synthetic_trace import run_info, step_loads
from titan_moe_lb import cli
from titan_moe_lb.traces.trace import TraceWriter
for step in (1, 2):
    writer = TraceWriter(sys.argv[1], run_info())
    writer.write(step, next(step_loads(run_info(), 1)))
    writer.close()
cli.main(["report", sys.argv[1]])
cli.main(["report", sys.argv[1], sys.argv[1]])
cli.main(["watch", "--once", sys.argv[1]])
cli.main(["diagnose", sys.argv[1]])
"""


def test_a_folder_whose_name_the_locale_lacks(tmp_path):
    folder = tmp_path / "lauf-\u00e9-\u6f22"
    bare = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    result = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, folder],
        env={**os.environ, **bare},
        capture_output=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr.decode()
    assert read_trace(folder).steps.tolist() == [1, 2]
    assert sorted(path.name for path in folder.iterdir()) == [
        FILE_NAME,
        "report.html",
    ]


def test_reader_goes_on_where_it_ended(tmp_path):
    info = run_info()
    writer = TraceWriter(tmp_path, info)
    loads = loads_by_step(info, 4)
    writer.write(1, loads[1])
    reader = TraceReader(tmp_path)
    assert reader.read().steps.tolist() == [1]
    assert reader.read().steps.tolist() == []
    writer.write(2, loads[2])
    writer.write(3, loads[3])
    assert reader.read().steps.tolist() == [2, 3]


def test_reading_and_reporting_need_no_torch(tmp_path):
    write_run(tmp_path, run_info(), 3)
    script = (
        "import sys\n"
        "from titan_moe_lb import cli\n"
        "assert not {'torch', 'pyarrow', 'plotly'} & set(sys.modules)\n"
        "cli.main(['report', sys.argv[1]]); cli.main(['watch', sys.argv[1], '--once'])\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, capture_output=True)


def test_long_trace_is_read_at_evenly_spread_steps(tmp_path):
    """An independent choice of the steps cannot be byte-exact: half a distance of tolerance."""
    info = run_info(2, 4)
    write_run(tmp_path, info, 2000)
    whole = read_trace(tmp_path)
    sample = read_trace(tmp_path, most_bytes=500 * 2 * 4 * 8)
    assert not whole.is_sample and sample.is_sample and 450 <= len(sample.steps) <= 500
    assert sample.steps[0] == 1 and sample.steps[-1] == 2000
    assert np.abs(np.diff(sample.steps) - 4).max() <= 2
    rows = sample.steps - 1
    np.testing.assert_array_equal(sample.counts_SME, whole.counts_SME[rows])
    for name, values_SM in sample.layer_columns.items():
        np.testing.assert_array_equal(values_SM, whole.layer_columns[name][rows])
    assert not read_trace(tmp_path, most_bytes=1 << 20).is_sample
    reader = TraceReader(tmp_path)
    reader.skip_to_last(7)
    assert reader.read().steps.tolist() == list(range(1994, 2001))
