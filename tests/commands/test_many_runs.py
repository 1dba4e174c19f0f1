"""Tests of ``report`` and ``diagnose`` on several runs. Their counts are known, so that every
expected value is computed by hand."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest

from tests.commands.test_report import Page, curve, spaced
from tests.support import browser
from tests.support.synthetic_trace import run_info
from titan_moe_lb import cli
from titan_moe_lb.traces.load_trace import LoadTrace
from titan_moe_lb.traces.step_load import StepLoad
from titan_moe_lb.traces.trace import TraceWriter

STEPS = 12
EVEN, HOT = [100, 100, 100, 100], [250, 50, 50, 50]
"""MaxVio 0, and 250 / 100 - 1 = 1.5."""


def write(folder, counts_E, steps=STEPS, close=True, loss=3.0, **changes):
    """Write a run of 2 layers with these counts in each; loss, overload and idle experts by step."""
    info = run_info(2, len(counts_E), 1, **{"losses": {}, **changes})
    writer = TraceWriter(folder, info)
    counts_ME = np.array([counts_E, counts_E])
    overload = max(sum(counts_E[:2]), sum(counts_E[2:])) * 2 / sum(counts_E)
    for step in range(1, steps + 1):
        of_layers = {"avg_overload_factor": overload, "max_overload_factor": overload}
        writer.write(
            step,
            StepLoad(
                layers=info.layers,
                counts_ME=counts_ME,
                layer_columns={name: np.full(2, value) for name, value in of_layers.items()},
                step_columns={"loss": loss + 1 / step},
            ),
        )
    if close:
        writer.close()
    return folder


@pytest.fixture
def runs(tmp_path):
    write(tmp_path / "run_2", EVEN, seed=2)
    write(tmp_path / "run_10", HOT, seed=10, loss=2.0)
    return tmp_path


def printed(capsys, *arguments):
    status = 0
    try:
        cli.main([*map(str, arguments)])
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    return status, out, err


def answer_of(capsys, *arguments):
    status, out, _err = printed(capsys, "diagnose", *arguments, "--json")
    return status, json.loads(out)


@pytest.mark.parametrize("words", [["."], ["run_2", "run_10"], ["run_*"], ["**/moe_load.arrow"]])
def test_runs_by_folders_patterns_and_names(runs, words, capsys, monkeypatch):
    monkeypatch.chdir(runs)
    status, answer = answer_of(capsys, *words)
    assert status == 0 and answer["left_out"] == {}
    first, second = answer["runs"]
    assert [first["name"], second["name"]] == ["seed 2", "seed 10"]
    assert [run["steps"] for run in answer["runs"]] == [STEPS, STEPS]
    assert [run["max_violation"] for run in answer["runs"]] == [0.0, 1.5]
    last = 1 / STEPS
    np.testing.assert_allclose([run["loss"] for run in answer["runs"]], [3 + last, 2 + last])
    assert first["findings"] == [] and first["well"]
    assert any(finding["layers"] == [1, 2] for finding in second["findings"])


def test_the_table_has_a_row_for_each_run(runs, capsys):
    status, out, _err = printed(capsys, "diagnose", runs)
    assert status == 0
    even, hot = (re.search(rf" seed {seed} .*", out)[0] for seed in (2, 10))
    assert re.findall(r"[\d.]+", even)[:6] == ["2", "1", "12", "3.083", "0", "1"]
    assert re.findall(r"[\d.]+", hot)[:6] == ["10", "1", "12", "2.083", "1.5", "1.5"]
    assert "0 of 8" in even and "none" in even and "warning" in hot


def test_status_of_several_runs(runs, capsys):
    even = runs / "run_2"
    assert printed(capsys, "diagnose", even, even.parent / "run_10", "--fail-on", "warning")[0] == 1
    twin = write(runs / "even", EVEN, seed=3)
    assert printed(capsys, "diagnose", even, twin, "--fail-on", "note")[0] == 0
    short = write(runs / "short", EVEN, steps=2, seed=4)
    assert printed(capsys, "diagnose", even, short)[0] == 0
    status, out, _err = printed(capsys, "diagnose", even, short, "--fail-on", "fault")
    assert status == 1 and "2 logged steps" in out


def test_one_run_in_a_folder_of_runs_has_the_same_form_as_several(tmp_path, capsys):
    write(tmp_path / "only", EVEN)
    assert len(answer_of(capsys, tmp_path)[1]["runs"]) == 1
    assert answer_of(capsys, tmp_path / "only")[1]["steps"] == STEPS
    printed(capsys, "report", tmp_path)
    assert (tmp_path / "only" / "report.html").exists()


def test_a_run_that_is_named_twice_is_shown_once(runs, capsys):
    (runs / "link").symlink_to(runs / "run_2")
    status, answer = answer_of(capsys, runs / "run_2", runs / "link", runs)
    assert status == 0 and [run["name"] for run in answer["runs"]] == ["seed 2", "seed 10"]
    status, out, _err = printed(capsys, "report", runs / "run_2", runs, "-o", runs / "page.html")
    assert status == 0 and f"{runs / 'run_2' / 'moe_load.arrow'} is named twice" in out


def test_a_damaged_run_among_good_ones(runs, capsys):
    broken = runs / "broken" / "moe_load.arrow"
    broken.parent.mkdir()
    broken.write_bytes(b"nothing" * 100)
    status, answer = answer_of(capsys, runs)
    assert status == 1 and len(answer["runs"]) == 2
    assert list(answer["left_out"]) == [str(broken)]
    assert printed(capsys, "diagnose", runs)[1].count(f"left out: {broken}") == 1
    status, out, _err = printed(capsys, "report", runs)
    assert status == 1 and out.count(f"left out: {broken}") == 1
    page = Page((runs / "compare.html").read_text())
    assert str(broken) in page.visible and len(page.data["runs"]) == 2
    cut = runs / "run_2" / "moe_load.arrow"
    cut.write_bytes(cut.read_bytes()[:-20])
    out = printed(capsys, "diagnose", runs / "run_2", runs / "run_10")[1]
    assert "seed 2: moe_load.arrow was cut off" in out
    status, out, err = printed(capsys, "diagnose", broken.parent, broken)
    assert status == 2 and out == "" and err.count("\n") == 1 and str(broken) in err


def test_a_run_that_is_still_written(runs, capsys):
    write(runs / "running", EVEN, seed=3, close=False)
    status, answer = answer_of(capsys, runs)
    assert status == 0 and [run["ended"] for run in answer["runs"]] == [True, True, False]
    rows = re.findall(r"12 logged.*", printed(capsys, "diagnose", runs)[1])
    assert ["cut off" in row for row in rows] == [False, False, True]


def test_the_page_has_one_chart_a_quantity_and_a_table(runs, capsys):
    write(runs / "idle", [400, 0, 0, 0], seed=11, steps=6)
    status, out, _err = printed(capsys, "report", runs)
    assert status == 0 and out.startswith(f"{runs / 'compare.html'}: 3 runs")
    page = Page((runs / "compare.html").read_text())
    figures = {
        figure["layout"]["yaxis"]["title"]["text"]: figure
        for figures in page.charts
        for figure in figures
    }
    expected = {
        "loss": ([3 + 1 / 6], [3 + 1 / 12], [2 + 1 / 12]),
        "MaxVio": ([3.0], [0.0], [1.5]),
        "tokens / balanced": ([2.0], [1.0], [1.5]),
        "experts": ([6], [0], [0]),
    }
    for name, values in expected.items():
        for mark, value in zip("ABC", values, strict=True):
            x, y = curve(figures[name], mark)
            assert x[-1] == (6 if mark == "A" else 12)
            np.testing.assert_allclose(y[-1:], value, rtol=1e-6, err_msg=f"{name} {mark}")
    rows = re.findall(r'<th scope="row"><a href="(#run-\w)">(.*?)</a>', page.html)
    assert rows == [("#run-A", "A seed 11"), ("#run-B", "B seed 2"), ("#run-C", "C seed 10")]
    places = {value for _tag, name, value in page.attributes if name == "id"}
    assert {"run-A", "run-B", "run-C"} <= places
    assert "6 of 8" in spaced(page)


def test_runs_of_other_shapes_are_compared_and_their_differences_named(runs, capsys):
    write(runs / "other", [100] * 7 + [800], model="qwen3", seed=12, global_batch_size=16)
    with LoadTrace(runs / "foreign", top_k=1, model="vllm") as trace:
        for step in range(1, STEPS + 1):
            trace.write(step, {3: EVEN})
    status, out, _err = printed(capsys, "diagnose", runs)
    assert status == 0
    for value in ("deepseek_v3 debugmodel", "qwen3 debugmodel", "vllm"):  # of different losses
        assert re.search(rf"[Ll]osses .*{value} \(", out)
    assert re.search(r"MaxVio differs: 3 \(.*; 7 \(", out)  # E / K - 1
    assert "2,048 (" in out and "4,096 (" in out  # 8 and 16 sequences of 256 tokens
    _status, answer = answer_of(capsys, runs)
    by_name = {run["name"]: run for run in answer["runs"]}
    assert len(by_name) == 4
    (foreign,) = [run for run in answer["runs"] if "/foreign/" in run["path"]]
    assert foreign["loss"] is None and foreign["max_violation"] == 0
    (other,) = [run for run in answer["runs"] if "/other/" in run["path"]]
    assert math.isclose(other["max_violation"], 800 * 8 / 1500 - 1)
    assert printed(capsys, "report", runs)[0] == 0


def test_a_picked_expert_that_one_run_lacks(tmp_path, capsys):
    write(tmp_path / "a", [200, 100, 50, 50], steps=3)
    with LoadTrace(tmp_path / "b", top_k=1) as trace:
        for step in range(1, 7):
            trace.write(step, {2: [50, 50, 100, 100, 100, 200]})
    printed(capsys, "report", tmp_path)
    shown = browser.act(
        tmp_path / "compare.html",
        """
        await until(() => document.getElementById("step").textContent);
        const [layer, expert] = ["layer", "expert"].map((id) => document.getElementById(id));
        const seen = [];
        for (const [l, e] of [[1, 0], [2, 0], [2, 5]]) {
          layer.value = l; expert.value = e; layer.dispatchEvent(new Event("input"));
          seen.push([document.getElementById("picked").textContent, document.getElementById("step").textContent,
            [0, 1].map((run) => document.getElementById(`heatmap-${run}`).layout.shapes[0].visible)]);
        }
        return seen;
        """,
    )
    steps = "A: step 3, B: step 6"  # the slider has the steps of the longer run
    assert shown == [
        ["A: 2.0 × balanced, B: – × balanced", steps, [True, False]],
        ["A: 2.0 × balanced, B: 0.50 × balanced", steps, [True, True]],
        ["A: – × balanced, B: 2.0 × balanced", steps, [False, True]],
    ]


def test_thirty_runs_on_a_page_and_no_more(tmp_path, capsys):
    for seed in range(30):
        write(tmp_path / f"{seed}", EVEN, steps=6, seed=seed, loss=3 + 1e-3 * seed)
    assert printed(capsys, "report", tmp_path)[0] == 0
    page = Page((tmp_path / "compare.html").read_text())
    (loss, *_), *_ = page.charts
    layout = loss["layout"]
    labels = layout["annotations"]
    pens = {(one["line"]["color"], one["line"]["dash"]) for one in loss["data"]}
    assert len(pens) == len({label["text"] for label in labels}) == 30
    plot = layout["height"] - layout["margin"]["t"] - layout["margin"]["b"]
    heights = np.sort([label["y"] for label in labels]) * plot
    assert np.diff(heights).min() > 15.9 and heights.min() >= 0, "no label on another"
    assert heights.max() <= plot
    write(tmp_path / "30", EVEN, steps=6, seed=30)
    status, _out, err = printed(capsys, "report", tmp_path)
    assert status == 2 and err.count("\n") == 1 and "30" in err and "31" in err
    assert printed(capsys, "diagnose", tmp_path)[0] == 0
