"""Tests of the trace file: it reads back, and no damage causes a traceback."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.synthetic_trace import COLUMNS, LOSS, run_info, step_loads, write_run
from titan_moe_lb import cli
from titan_moe_lb.commands.diagnose.checks import findings
from titan_moe_lb.errors import JobError
from titan_moe_lb.traces.batch_reader import END
from titan_moe_lb.traces.columns import Column
from titan_moe_lb.traces.run_info import FORMAT_VERSION
from titan_moe_lb.traces.step_load import StepLoad
from titan_moe_lb.traces.trace import (
    FILE_NAME,
    MICRO_BATCH,
    TraceReader,
    TraceWriter,
    last_step,
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


def file_of(folder, info, num_steps):
    """Write a trace; return it, its bytes, and the end of the schema and of each step."""
    writer, file, ends = TraceWriter(folder, info), folder / FILE_NAME, []
    for step, load in enumerate(step_loads(info, num_steps), start=1):
        writer.write(step, load)
        ends.append(file.stat().st_size)
    with pa.OSFile(str(file)) as stream:
        pa.ipc.read_schema(stream)
        return file, file.read_bytes(), [stream.tell(), *ends]


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


def without_checksums(file, change=lambda table: None):
    """Rewrite the trace as a writer without checksums would, with another description."""
    reader = pa.ipc.open_stream(file.read_bytes())
    description = json.loads(reader.schema.metadata[b"titan_moe_lb"])
    change(description)
    metadata = {b"titan_moe_lb": json.dumps(description).encode()}
    batches = [batch.replace_schema_metadata(metadata) for batch in reader]
    return batches, metadata


def rewrite(file, batches):
    """Rewrite the trace with pyarrow, which ends a stream with a marker."""
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_stream(file, batches[0].schema, options=options) as writer:
        for batch in batches:
            writer.write_batch(batch)


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


def as_format_1(table):
    table["format_version"] = 1
    table["load_balance_coeff"] = 1e-3
    del table["expert_bias"]
    del table["figures"]


def test_trace_of_format_1_is_read(tmp_path):
    """Format 1 has four columns and the losses, none of them declared."""
    file = write_run(tmp_path, run_info(), 3) / FILE_NAME
    new = read_trace(file)
    batches, _metadata = without_checksums(file, as_format_1)
    kept = ["step", "layer", "counts", "avg_overload_factor", "max_overload_factor"]
    kept += ["max_cum_overload_factor", "micro_batch_max_violation", LOSS]
    rewrite(file, [batch.select(kept) for batch in batches])
    old = read_trace(file)
    assert old.damage == () and old.steps.tolist() == [1, 2, 3]
    np.testing.assert_array_equal(old.counts_SME, new.counts_SME)
    for name in kept[3:]:
        np.testing.assert_array_equal(old.over_steps(name), new.over_steps(name))
    assert old.layer_columns.keys() == {*kept[3:5], *kept[6:]}
    assert [column.name for column in old.info.columns if column.is_aux_loss] == [LOSS]
    assert old.info.expert_bias == "sign (speed 0.001)", "the one rule there was"
    for name in ("bias_range", "loss", "step_seconds"):
        assert np.isnan(old.over_steps(name)).all() and len(old.over_steps(name)) == 3
    cli.main(["report", str(tmp_path)])
    cli.main(["watch", str(tmp_path), "--once"])
    # And a run of today goes on with it: what it lacked is missing there, not everywhere.
    TraceWriter(tmp_path, run_info()).write(4, next(step_loads(run_info(), 1)))
    continued = read_trace(tmp_path)
    assert continued.steps.tolist() == [1, 2, 3, 4]
    assert np.isnan(continued.over_steps("loss")).tolist() == [True, True, True, False]


def test_damage_to_a_trace_without_checksums_is_never_a_traceback(tmp_path):
    file = write_run(tmp_path, run_info(2, 4), 4) / FILE_NAME
    rewrite(file, without_checksums(file, as_format_1)[0])
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


def test_what_a_newer_writer_adds_is_kept(tmp_path):
    file = write_run(tmp_path, run_info(), 3) / FILE_NAME

    def change(table):
        table["colour"] = "blue"
        table["figures"][0]["unit"] = "nats"

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


def test_two_models_are_refused_by_both_names(tmp_path):
    one = read_trace(write_run(tmp_path / "one", run_info(4, 8), 2))
    other = read_trace(write_run(tmp_path / "other", run_info(4, 16, model="qwen3"), 2))
    with pytest.raises(JobError) as error:
        one.info.require_same_model(other.info, str(one.path), str(other.path))
    assert "deepseek_v3 debugmodel (4 MoE layers, 8 experts, top 2)" in str(error.value)
    assert "qwen3 debugmodel (4 MoE layers, 16 experts, top 2)" in str(error.value)
    one.info.require_same_model(one.info, "here", "there")


def loads_by_step(info, num_steps):
    return dict(enumerate(step_loads(info, num_steps), start=1))


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
cli.main(["report", sys.argv[1], "--compare", sys.argv[1]])
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
        "compare.html",
        FILE_NAME,
        "report.html",
    ]


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


FULL_DISK = """
import logging, resource, sys
from pathlib import Path
from tests.support.synthetic_trace import run_info, step_loads
from titan_moe_lb.traces.trace import TraceWriter
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
info = run_info(8, 64)
writer = TraceWriter(Path(sys.argv[1]), info)
for step, load in enumerate(step_loads(info, 20), start=int(sys.argv[3])):
    writer.write(step, load)
writer.close()
print("trained to the end")
"""


def train_on_full_disk(folder, limit, first_step=1):
    return subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(folder), str(limit), str(first_step)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()


def test_full_disk_ends_the_recording_not_the_training(tmp_path):
    limit = 20_000
    warning, end = train_on_full_disk(tmp_path, limit)
    assert end == "trained to the end"
    assert warning.startswith("WARNING")
    trace = read_trace(tmp_path)
    assert 1 < len(trace.steps) < 20 and (tmp_path / FILE_NAME).stat().st_size == limit
    assert trace.steps.tolist() == list(range(1, len(trace.steps) + 1))
    assert f" {len(trace.steps) + 1} " in warning
    assert trace.damage


def test_full_disk_while_resuming_leaves_the_earlier_steps(tmp_path):
    write_run(tmp_path, run_info(8, 64), 12)
    before = (tmp_path / FILE_NAME).read_bytes()
    warning, _end = train_on_full_disk(tmp_path, len(before) // 2, first_step=11)
    assert " 11 " in warning
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    assert read_trace(tmp_path).steps.tolist() == list(range(1, 11))
    assert before.startswith((tmp_path / FILE_NAME).read_bytes())


def test_folder_that_cannot_be_made_is_one_warning(tmp_path, caplog):
    (tmp_path / "outputs").write_text("a file where the folder should be")
    info = run_info()
    writer = TraceWriter(tmp_path / "outputs" / "run", info)
    with caplog.at_level(logging.WARNING):
        for step, load in enumerate(step_loads(info, 3), start=1):
            writer.write(step, load)
        writer.close()
    (record,) = caplog.records
    assert str(tmp_path / "outputs") in record.getMessage()


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


def test_kill_at_every_byte_of_the_end_loses_no_step(tmp_path):
    file = write_run(tmp_path, run_info(2, 4), 3) / FILE_NAME
    content = file.read_bytes()
    assert content.endswith(END) and read_trace(file).ended
    for cut in range(1, len(END) + 1):
        file.write_bytes(content[:-cut])
        trace = read_trace(file)
        assert trace.steps.tolist() == [1, 2, 3] and not trace.ended
        assert last_step(file) == 3


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


def test_column_that_the_file_lacks_is_added_in_a_copy(tmp_path):
    write_run(tmp_path, run_info(8, 64, losses={}), 12)
    before = (tmp_path / FILE_NAME).read_bytes()
    warning, _end = train_on_full_disk(tmp_path, len(before) // 2, first_step=11)
    assert " 11 " in warning and (tmp_path / FILE_NAME).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    train_on_full_disk(tmp_path, 1 << 30, first_step=11)
    loss_S = read_trace(tmp_path).over_steps(LOSS)
    assert np.isnan(loss_S).tolist() == [True] * 10 + [False] * 20
