"""Tests of hostile files and names: a short form of ``python -m tests.fuzz``, and proof that it can
fail."""

from __future__ import annotations

import pickle
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.fuzz import run
from tests.fuzz.damage import HOSTILE_TEXT
from tests.fuzz.guard import Hang
from tests.fuzz.targets import TARGETS, Target, hostile_run
from tests.support import browser
from tests.support.synthetic_trace import run_info, write_run
from titan_moe_lb import cli
from titan_moe_lb.traces.routing_trace import RoutingTrace, RoutingTraceWriter
from titan_moe_lb.traces.trace import FILE_NAME


@pytest.mark.parametrize("target", TARGETS)
def test_a_damaged_file_is_read_or_refused_in_one_line(target):
    outcome = run.fuzz(target, 25, 0)
    assert outcome.cases >= 25 and 0 < outcome.refused < outcome.cases


def _outside(content: int, folder: Path) -> None:
    (folder.parent / f"{folder.name}-outside").touch()


FORBIDDEN = {
    "a file outside": (_outside, "open .*-outside"),
    "a folder outside": (lambda case, folder: folder.with_name("x").mkdir(), "os.mkdir .*/x"),
    "a program": (lambda case, folder: subprocess.run(["true"]), "subprocess.Popen"),
    "a pickle": (lambda case, folder: pickle.loads(pickle.dumps(Path("x"))), "pickle.find_class"),
    "a connection": (
        lambda case, folder: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(
            ("127.0.0.1", 9)
        ),
        "socket.connect",
    ),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_the_guard_hears_what_a_reader_must_not_do(what, tmp_path):
    act, heard = FORBIDDEN[what]
    (folder := tmp_path / "folder").mkdir()
    with (
        pytest.raises(AssertionError, match=heard),
        run._guard.watch(folder, seconds=30, may_unpickle=False),
    ):
        act(0, folder)
    with run._guard.watch(folder, seconds=30, may_unpickle=False):
        (folder / "inside").touch()


def test_a_traceback_and_a_hang_are_failures(monkeypatch):
    def broken(case: bytes, folder: Path) -> None:
        if case != b"sound":
            raise KeyError(case)

    def endless(case: bytes, folder: Path) -> None:
        time.sleep(60)

    sound = TARGETS["hardware"].cases
    monkeypatch.setitem(TARGETS, "broken", Target(sound, broken))
    with pytest.raises(KeyError):
        run.fuzz("broken", 3, 0)
    monkeypatch.setitem(TARGETS, "endless", Target(sound, endless))
    monkeypatch.setattr(run, "SECONDS", 0.1)
    with pytest.raises(Hang):
        run.fuzz("endless", 1, 0)


@pytest.mark.parametrize("field", ["global_batch_size", "seq_len"])
def test_a_routing_trace_that_claims_more_tokens_than_memory_is_one_line(field, tmp_path):
    """Case found by fuzzing."""
    sizes = {"global_batch_size": 10**6, "seq_len": 10**6, field: 10**9}
    info = run_info(2, 8, world_size=10**9, **sizes)
    writer = RoutingTraceWriter(tmp_path, info, rank=0)
    ids = [[[0, 1]] * 4]
    writer.write(step=1, layer=1, first_sequence=0, token_slices=[(0, 4)], expert_ids_BLK=ids)
    writer.close()
    with pytest.raises(ValueError, match="more than this machine has memory for"):
        RoutingTrace(tmp_path).expert_ids(1, 1)


def test_hostile_names_are_inert_on_a_page(tmp_path):
    """Names of folder, model, rule and metrics appear as plain text."""
    folder = tmp_path / "<img src=x onerror=hostile()>"
    folder.mkdir()
    file = write_run(folder, run_info(2, 8), 12) / FILE_NAME
    words = [word for word in HOSTILE_TEXT if "hostile" in word]
    file.write_bytes(hostile_run(file.read_bytes(), words))
    cli.main(["report", str(folder), "--output", str(tmp_path / "page.html")])
    shown = browser.act(
        tmp_path / "page.html",
        """
        const plots = [...document.querySelectorAll(".plot")];
        await until(() => plots.length && plots.every((plot) => plot.querySelector("svg.main-svg")));
        const all = [...document.querySelectorAll("*")];
        return {
          images: all.filter((one) => one.tagName == "IMG").length,
          scripts: all.filter((one) => one.tagName == "SCRIPT" && /^\\s*hostile/.test(one.text)).length,
          handlers: all.filter((one) => one.hasAttribute("onerror")).length,
          text: document.querySelector("main").textContent,
        };
        """,
    )
    assert (shown["images"], shown["scripts"], shown["handlers"]) == (0, 0, 0)
    assert all(word in shown["text"] for word in words), "they are shown as they are"
