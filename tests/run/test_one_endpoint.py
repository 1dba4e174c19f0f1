"""Two runs at one RDZV_ENDPOINT: the second does not meet the first, which goes on. Real processes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.support.job_processes import TINY, end, fork, read_to, working_in

PP2 = [*TINY, "--training.steps=100000", "--parallelism.pipeline_parallel_degree=2"]


@pytest.fixture(autouse=True)
def nobody_is_left(tmp_path):
    yield
    for one in working_in(tmp_path):
        one.kill()


@pytest.mark.parametrize("is_static", [True, False], ids=["NODE_RANK", "no NODE_RANK"])
def test_a_second_run_does_not_meet_the_first(is_static, tmp_path):
    """By its folder, or by RDZV_ID; and not where a launcher has its place, or its folder."""
    port = 20000 + (os.getpid() + is_static) % 10000

    def node(number: int, folder: Path, **more: str):
        place = {"NODE_RANK": str(number)} if is_static else {}
        nodes = {"NNODES": "2", "NGPU": "1", "RDZV_ENDPOINT": f"localhost:{port}", **place}
        return fork(folder, *PP2, **nodes, **more)

    first = [node(number, tmp_path / "first", RDZV_ID="first") for number in (0, 1)]
    shows = read_of(first)
    ranks = {one.pid for one in working_in(tmp_path / "first/logs")}

    other = tmp_path / "other"
    refused = {
        (other, "", "3"): (1, "RDZV_ID"),
        (other, "second", "3"): (1, "RDZV_ID"),
        (tmp_path / "first", "second", "60"): (2, f"dump_folder {tmp_path}/first"),
    }
    if is_static:
        refused[other, "first", "60"] = 2, "NODE_RANK=1"
    for (folder, agreed, seconds), (expected, named) in refused.items():
        second = node(1, folder, RDZV_ID=agreed, RDZV_TIMEOUT=seconds)
        status, _out, err = end(second, other)
        assert status == expected and err.count("\n") == 1 and named in err, err

    read_to(shows, "step:")
    assert {one.pid for one in working_in(tmp_path / "first/logs")} == ranks
    for launcher in first:
        launcher.send_signal(signal.SIGTERM)
    for launcher in first:
        launcher.communicate(timeout=120)


def read_of(launchers):
    """The launcher whose node shows the steps, after the third of them."""
    for launcher in launchers:
        for line in launcher.stdout:
            if "shows the steps" in line:
                break
            if "step:  3" in line:
                return launcher
    raise AssertionError([launcher.communicate(timeout=60) for launcher in launchers])
