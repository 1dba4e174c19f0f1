"""Tests of a trace that cannot be written: training goes on."""

from __future__ import annotations

import logging
import subprocess
import sys

import numpy as np

from tests.support.synthetic_trace import (
    LOSS,
    run_info,
    step_loads,
    write_run,
)
from titan_moe_lb.traces.trace import (
    FILE_NAME,
    TraceWriter,
    read_trace,
)

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


def test_column_that_the_file_lacks_is_added_in_a_copy(tmp_path):
    write_run(tmp_path, run_info(8, 64, losses={}), 12)
    before = (tmp_path / FILE_NAME).read_bytes()
    warning, _end = train_on_full_disk(tmp_path, len(before) // 2, first_step=11)
    assert " 11 " in warning and (tmp_path / FILE_NAME).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    train_on_full_disk(tmp_path, 1 << 30, first_step=11)
    loss_S = read_trace(tmp_path).over_steps(LOSS)
    assert np.isnan(loss_S).tolist() == [True] * 10 + [False] * 20


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
