"""The trace file: what is written comes back, and nothing that happens to a file is a traceback."""

from __future__ import annotations

import dataclasses
import json
import logging
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.synthetic_trace import LOSS, run_info, step_loads, write_run
from titan_moe_lb import cli
from titan_moe_lb.errors import JobError
from titan_moe_lb.traces.run_info import FORMAT_VERSION, RunInfo
from titan_moe_lb.traces.step_load import StepLoad
from titan_moe_lb.traces.trace import FILE_NAME, TraceReader, TraceWriter, read_trace

FIGURES = st.floats(allow_infinity=False)


@st.composite
def runs(draw):
    num_layers, num_experts = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    losses = {name: 0.5 for name in draw(st.sets(st.sampled_from(["z_loss", "a", "ß"])))}
    info = run_info(num_layers, num_experts, 1, losses=losses)
    counts = st.lists(
        st.integers(0, 2**62), min_size=num_layers * num_experts, max_size=num_layers * num_experts
    )

    def per_layer():
        return np.array(draw(st.lists(FIGURES, min_size=num_layers, max_size=num_layers)))

    loads = [
        StepLoad(
            layers=info.layers,
            counts_ME=np.array(draw(counts), dtype=np.int64).reshape(num_layers, num_experts),
            losses={name: per_layer() for name in losses},
            avg_overload_factor_M=per_layer(),
            max_overload_factor_M=per_layer(),
            micro_batch_max_violation_M=per_layer(),
            max_cum_overload_factor=draw(FIGURES),
        )
        for _ in range(draw(st.integers(1, 3)))
    ]
    return (
        info,
        sorted(draw(st.sets(st.integers(0, 2**40), min_size=3, max_size=3)))[: len(loads)],
        loads,
    )


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
    assert trace.info == info and trace.truncated is None
    assert trace.steps.tolist() == steps
    for index, load in enumerate(loads):
        np.testing.assert_array_equal(trace.counts_SME[index], load.counts_ME)
        np.testing.assert_array_equal(
            trace.avg_overload_factor_SM[index], load.avg_overload_factor_M
        )
        np.testing.assert_array_equal(
            trace.max_overload_factor_SM[index], load.max_overload_factor_M
        )
        np.testing.assert_array_equal(
            trace.micro_batch_max_violation_SM[index], load.micro_batch_max_violation_M
        )
        np.testing.assert_array_equal(
            trace.max_cum_overload_factor_S[index], load.max_cum_overload_factor
        )
        assert trace.losses.keys() == load.losses.keys()
        for name in load.losses:
            np.testing.assert_array_equal(trace.losses[name][index], load.losses[name])


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
    assert table[LOSS].to_pylist()[:2] == first.losses[LOSS].tolist()


def test_cut_at_every_byte_gives_whole_steps_or_one_line(tmp_path):
    info = run_info(2, 4, losses={})
    writer = TraceWriter(tmp_path / "run", info)
    file, ends = tmp_path / "run" / FILE_NAME, []
    for step, load in enumerate(step_loads(info, 2), start=1):
        writer.write(step, load)
        ends.append(file.stat().st_size)
    cut, content = tmp_path / "cut.arrow", file.read_bytes()
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
            assert (trace.truncated is None) == (size in ends)
            if trace.truncated:
                assert f"read up to step {whole}" in trace.truncated


def test_damaged_bytes_are_never_a_traceback(tmp_path):
    content = (write_run(tmp_path, run_info(2, 4), 3) / FILE_NAME).read_bytes()
    damaged = tmp_path / "damaged.arrow"
    random = np.random.default_rng(0)
    for _ in range(600):
        array = np.frombuffer(content, dtype=np.uint8).copy()
        where = random.integers(0, len(array), size=random.integers(1, 4))
        array[where] = random.integers(0, 256, size=len(where))
        damaged.write_bytes(array.tobytes())
        try:
            read_trace(damaged)
        except JobError as error:
            assert "\n" not in str(error)


def foreign_stream(path):
    table = pa.table({"step": [1]})
    with pa.ipc.new_stream(str(path), table.schema) as stream:
        stream.write_table(table)


def newer(path):
    info = dataclasses.replace(run_info(), format_version=FORMAT_VERSION + 1)
    TraceWriter(path, info).write(1, next(step_loads(info, 1)))


UNREADABLE = {
    "empty": (lambda path: path.touch(), "is empty"),
    "text": (lambda path: path.write_text("step,loss\n1,2\n" * 50), "is not a trace"),
    "zeros": (lambda path: path.write_bytes(bytes(4096)), "is not a trace"),
    "foreign": (foreign_stream, "not a trace of titan_moe_lb"),
    "newer": (newer, "update titan_moe_lb"),
    "missing": (lambda path: None, "there is no such folder or file"),
    "folder": (lambda path: path.mkdir(), "has no moe_load.arrow"),
}


@pytest.mark.parametrize("case", UNREADABLE)
@pytest.mark.parametrize("command", ["report", "watch"])
def test_what_is_no_trace_is_one_line_and_status_2(case, command, tmp_path, capsys):
    make, expected = UNREADABLE[case]
    path = tmp_path / "thing.arrow"
    if case == "folder":
        path = tmp_path / "thing"
    make(path)
    with pytest.raises(SystemExit) as stop:
        cli.main([command, str(path)] + ["--once"] * (command == "watch"))
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("titan_moe_lb: error: ") and said.count("\n") == 1
    assert expected in said and "thing" in said


def test_two_models_are_refused_by_both_names(tmp_path):
    one = read_trace(write_run(tmp_path / "one", run_info(4, 8), 2))
    other = read_trace(write_run(tmp_path / "other", run_info(4, 16, model="qwen3"), 2))
    with pytest.raises(JobError) as error:
        one.require_same_model(other)
    assert "deepseek_v3 debugmodel (4 MoE layers, 8 experts, top 2)" in str(error.value)
    assert "qwen3 debugmodel (4 MoE layers, 16 experts, top 2)" in str(error.value)
    one.require_same_model(one)


def loads_by_step(info, num_steps):
    return dict(enumerate(step_loads(info, num_steps), start=1))


def test_resumed_run_continues_the_file(tmp_path):
    info = run_info()
    write_run(tmp_path, info, 7)
    resumed = dataclasses.replace(info, losses={"z_loss": 1.0}, pp=1, started="later")
    writer = TraceWriter(tmp_path, resumed)
    assert read_trace(tmp_path).steps.tolist() == [1, 2, 3, 4, 5, 6, 7], "nothing happens yet"
    again = loads_by_step(resumed, 9)
    for step in (5, 6, 7, 8):
        writer.write(step, again[step])
        assert read_trace(tmp_path).steps[-1] == step
    writer.close()
    trace = read_trace(tmp_path)
    assert trace.steps.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert trace.info == dataclasses.replace(resumed, resumed_at=(5,))
    first = loads_by_step(info, 7)
    for step in range(1, 5):
        np.testing.assert_array_equal(trace.counts_SME[step - 1], first[step].counts_ME)
    for step in range(5, 9):
        np.testing.assert_array_equal(trace.counts_SME[step - 1], again[step].counts_ME)
    assert np.isnan(trace.losses["z_loss"][:4]).all() and np.isnan(trace.losses[LOSS][4:]).all()
    assert not np.isnan(trace.losses[LOSS][:4]).any()
    assert not np.isnan(trace.losses["z_loss"][4:]).any()


def test_resume_after_a_crash_drops_the_torn_step(tmp_path):
    info = run_info()
    file = write_run(tmp_path, info, 5) / FILE_NAME
    file.write_bytes(file.read_bytes()[:-7])
    (tmp_path / f"{FILE_NAME}.new").write_bytes(b"left by a killed resume")
    TraceWriter(tmp_path, info).write(8, next(step_loads(info, 1)))
    trace = read_trace(tmp_path)
    assert trace.steps.tolist() == [1, 2, 3, 4, 8] and trace.truncated is None
    assert not (tmp_path / f"{FILE_NAME}.new").exists()


@pytest.mark.parametrize(
    "earlier, first_step, reason",
    [
        (run_info(), 1, "it holds nothing before step 1"),
        (run_info(4, 16), 3, "take two runs of one model"),
        (None, 3, "is not a trace"),
    ],
)
def test_what_is_not_continued_is_kept_aside(earlier, first_step, reason, tmp_path, caplog):
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
    assert reason in record.getMessage() and f"{FILE_NAME}.old-1" in record.getMessage()


def test_reader_goes_on_where_it_ended(tmp_path):
    info = run_info()
    writer = TraceWriter(tmp_path, info)
    loads = loads_by_step(info, 4)
    writer.write(1, loads[1])
    reader = TraceReader(tmp_path)
    assert [step for step, _load in reader] == [1]
    assert [step for step, _load in reader] == []
    writer.write(2, loads[2])
    writer.write(3, loads[3])
    assert [step for step, _load in reader] == [2, 3]


WRITE_FOREVER = """
import itertools, sys
from tests.synthetic_trace import run_info, step_loads
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
from tests.synthetic_trace import run_info, step_loads
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
    assert warning.startswith("WARNING") and "training goes on" in warning
    trace = read_trace(tmp_path)
    assert 1 < len(trace.steps) < 20 and (tmp_path / FILE_NAME).stat().st_size == limit
    assert trace.steps.tolist() == list(range(1, len(trace.steps) + 1))
    assert f"its steps from {len(trace.steps) + 1} on are not recorded" in warning
    assert trace.truncated


def test_full_disk_while_resuming_leaves_the_earlier_steps(tmp_path):
    write_run(tmp_path, run_info(8, 64), 12)
    before = (tmp_path / FILE_NAME).read_bytes()
    warning, _end = train_on_full_disk(tmp_path, len(before) // 2, first_step=11)
    assert "its steps from 11 on are not recorded" in warning
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    assert (tmp_path / FILE_NAME).read_bytes() == before


def test_folder_that_cannot_be_made_is_one_warning(tmp_path, caplog):
    (tmp_path / "outputs").write_text("a file where the folder should be")
    info = run_info()
    writer = TraceWriter(tmp_path / "outputs" / "run", info)
    with caplog.at_level(logging.WARNING):
        for step, load in enumerate(step_loads(info, 3), start=1):
            writer.write(step, load)
        writer.close()
    (record,) = caplog.records
    assert "training goes on, its steps from 1 on are not recorded" in record.getMessage()


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
        with pa.OSFile(str(file)) as stream:
            assert pa.ipc.open_stream(stream).read_all()["step"].to_pylist()[-2:] == [4, 4]


def test_a_trace_of_0_1_0_names_its_bias_rule():
    """It had one rule and wrote its speed."""
    table = dataclasses.asdict(run_info())
    del table["expert_bias"]
    table["load_balance_coeff"] = 1e-3
    schema = pa.schema([]).with_metadata({b"titan_moe_lb": json.dumps(table).encode()})
    assert RunInfo.of_schema(schema, Path("x")) == run_info(expert_bias="sign (speed 0.001)")


def test_run_info_survives_its_own_json(tmp_path):
    info = run_info(resumed_at=(5, 9), forced_routing='HotRank(rank=3, "half")', schedule=None)
    schema = pa.schema([("step", pa.int64())], metadata=info.metadata())
    assert RunInfo.of_schema(schema, tmp_path) == info


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
