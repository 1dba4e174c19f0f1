"""Tests of the report page without its script: curves, numbers and files.

``test_report_in_browser`` runs the script.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest

from tests.support.synthetic_trace import COLUMNS, LOSS, rewritten, run_info, step_loads, write_run
from titan_moe_lb import cli
from titan_moe_lb.traces.columns import Column
from titan_moe_lb.traces.trace import TraceWriter, read_trace


class Page(HTMLParser):
    """Parsed page: text of every element by id, all attributes, and the visible text."""

    def __init__(self, html):
        super().__init__()
        self.by_id, self.attributes, self.visible, self.styles = {}, [], "", ""
        self._open = []
        self.html = html
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag not in ("meta", "link", "input"):
            self._open.append((tag, dict(attributes).get("id")))

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag, f"</{tag}> closes nothing"
        self.visible += " "

    def handle_data(self, text):
        tag, identity = self._open[-1] if self._open else ("", None)
        if identity:
            self.by_id[identity] = self.by_id.get(identity, "") + text
        if tag == "style":
            self.styles += text
        elif tag != "script":
            self.visible += text

    def inflated(self, identity):
        return zlib.decompress(base64.b64decode(self.by_id[identity]))

    @property
    def data(self):
        return json.loads(self.inflated("data"))

    @property
    def charts(self):
        return json.loads(self.inflated("drawings"))


def report(*arguments):
    cli.main(["report", *map(str, arguments)])


def page_of(folder, *more):
    report(folder, *more)
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def curve(figure, name):
    def numbers(values):
        if isinstance(values, dict):
            return np.frombuffer(base64.b64decode(values["bdata"]), dtype=values["dtype"])
        return np.array(values, dtype=float)

    (found,) = [curve for curve in figure["data"] if curve["name"] == name]
    return numbers(found["x"]), numbers(found["y"])


def balanced_load(counts):
    return counts / counts.mean(axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("small"), run_info(4, 8), 30)
    return page_of(folder), read_trace(folder)


def test_curves_are_the_trace(small):
    page, trace = small
    (learning, violation), pace, (overload,), (loss,), (bias,) = page.charts
    violation_SM = trace.counts_SME.max(axis=2) / trace.counts_SME.mean(axis=2) - 1
    ordered_SM = np.sort(violation_SM, axis=1)
    for figure, name, expected_S in (
        (violation, "mean", violation_SM.mean(axis=1)),
        (violation, "maximum", violation_SM.max(axis=1)),
        (violation, "p50", (ordered_SM[:, 1] + ordered_SM[:, 2]) / 2),
        (violation, "micro-batch", trace.layer_columns["micro_batch_max_violation"].mean(axis=1)),
        (overload, "mean", trace.layer_columns["avg_overload_factor"].mean(axis=1)),
        (overload, "maximum", trace.layer_columns["max_overload_factor"].max(axis=1)),
        (overload, "cumulative", trace.step_columns["max_cum_overload_factor"]),
        (loss, "layer 3", trace.layer_columns[LOSS][:, 2]),
        (learning, "loss", trace.step_columns["loss"]),
        (pace[0], "grad norm", trace.step_columns["grad_norm"]),
        (pace[1], "tokens per second", trace.step_columns["tokens_per_second"]),
        (bias, "maximum", trace.layer_columns["bias_range"].max(axis=1)),
        (loss, "mean", trace.layer_columns[LOSS].mean(axis=1)),
    ):
        steps, values_S = curve(figure, name)
        assert steps.tolist() == trace.steps.tolist()
        np.testing.assert_allclose(values_S, expected_S, rtol=1e-6, err_msg=name)


def test_numbers_and_tables_are_the_trace(small):
    page, trace = small
    load_ME = balanced_load(trace.counts_SME).mean(axis=0)
    layer, expert = np.unravel_index(load_ME.argmax(), load_ME.shape)
    assert f"layer {trace.layers[layer]}, expert {expert}" in page.visible
    coldest = np.unravel_index(load_ME.argmin(), load_ME.shape)
    rows = re.findall(r"Coldest experts layer expert[a-z ]+(\d+) (\d+)", spaced(page))
    assert rows == [(str(trace.layers[coldest[0]]), str(coldest[1]))]
    assert f"{LOSS.replace('_', ' ')} × 0.0001" in page.visible
    assert "4 ranks, pp 2, dp_shard 2, ep 2, Interleaved1F1B" in page.visible
    first, last = (
        (counts.max(axis=1) / counts.mean(axis=1) - 1).mean()
        for counts in trace.counts_SME[[0, -1]]
    )
    loss_S = trace.step_columns["loss"]
    now = re.findall(r" (?:Loss|MaxVio) ([\d.]+) (?:step|mean)", spaced(page))
    captions = re.findall(r"(?:loss|MaxVio, mean): ([\d.]+) → ([\d.]+)", page.visible)
    expected = [(loss_S[0], loss_S[-1]), (first, last)]
    np.testing.assert_allclose(np.array(captions, dtype=float), expected, rtol=5e-3)
    assert now == [caption[1] for caption in captions]


def spaced(page):
    return re.sub(r"\s+", " ", page.visible)


def test_needs_no_network(small):
    page, _trace = small
    for tag, name, value in page.attributes:
        if name in ("src", "href", "srcset", "action", "data") and not value.startswith("#"):
            assert (tag, value) == ("link", "data:,")
    assert "url(" not in page.styles and "@import" not in page.styles
    html = "".join(value or "" for _tag, _name, value in page.attributes) + page.visible
    assert "://" not in html + page.styles
    assert b"Plotly" in page.inflated("plotly")


@pytest.mark.parametrize("kind, smallest_form", [("drifting", 1), ("independent", 0)])
def test_largest_model_is_below_5_mb_with_every_step(kind, smallest_form, tmp_path):
    # A small batch, so that chance alone moves every load by 6% from step to step.
    losses = {LOSS: 1.0, "z_loss": 1.0}
    info = run_info(61, 256, 8, global_batch_size=16, seq_len=512, losses=losses)
    folder = write_run(tmp_path, info, 200)
    if kind == "independent":
        random = np.random.default_rng(0)
        spread_SME = np.exp(0.4 * random.standard_normal((200, 61, 256)))
        folder = rewritten(folder, random.poisson(256 * spread_SME))
    page = page_of(folder)
    assert (folder / "report.html").stat().st_size < 5_000_000
    assert page.data["runs"][0]["frames"] == list(range(1, 201))
    assert "evenly spread" not in page.visible
    assert page.inflated("loads-0")[0] == smallest_form


def test_long_run_is_thinned_and_says_so(tmp_path):
    page = page_of(write_run(tmp_path, run_info(2, 8), 900, every=10))
    frames = page.data["runs"][0]["frames"]
    assert len(frames) == 400 and frames[0] == 1 and frames[-1] == 8991
    assert set(np.diff(frames)) == {20, 30}
    assert re.search(r"\b400\b.* 900\b", spaced(page))


def test_two_runs_side_by_side(tmp_path):
    one = write_run(tmp_path / "one", run_info(), 12)
    other = write_run(tmp_path / "other", run_info(losses={"z_loss": 1.0}), 7, seed=1)
    output = tmp_path / "both.html"
    report(one, other, "-o", output)
    page = Page(output.read_text())
    assert [len(run["frames"]) for run in page.data["runs"]] == [12, 7]
    *_, z_loss, bias = page.charts
    assert len(page.charts) == 6, (
        "learning, throughput, overload, the losses of either, the bias; no expert is idle"
    )
    for figures in page.charts:
        for figure in figures:
            titles = figure["layout"]["xaxis"]["title"], figure["layout"]["yaxis"]["title"]
            assert all(title["text"] for title in titles)
    for (figure,), trace in ((z_loss, read_trace(other)), (bias, read_trace(one))):
        drawn = curve(figure, "B" if figure is z_loss[0] else "A")
        name, summary = ("z_loss", np.mean) if figure is z_loss[0] else ("bias_range", np.max)
        np.testing.assert_allclose(drawn[1], summary(trace.layer_columns[name], axis=1), rtol=1e-6)
    assert [one["name"] for one in z_loss[0]["data"]] == ["B"]
    assert [note[-1] for note in re.findall(r"mean \((not [^)]*)\)", page.visible)] == ["B", "A"]
    assert [one["name"] for one in bias[0]["data"]] == ["A", "B"]
    dashes = [one["line"]["dash"] for one in bias[0]["data"]]
    assert len(set(dashes)) == 2, "not told apart by hue alone"
    assert [note["text"] for note in bias[0]["layout"]["annotations"]] == ["A", "B"]


def test_the_head_names_the_expert_that_is_hottest_now(tmp_path):
    """Expert 3 of layer 2 has twice its share in the first 10 of 12 steps, expert 6 of layer 4 in
    the last 2."""
    counts_SME = np.full((12, 4, 8), 100)
    counts_SME[:10, 1, 3] += 100
    counts_SME[10:, 3, 6] += 60
    run = rewritten(write_run(tmp_path, run_info(), 12), counts_SME)
    cli.main(["report", str(run)])
    visible = " ".join(Page((run / "report.html").read_text()).visible.split())
    # 160 of 860 tokens of 8 experts.
    card = visible.partition("Hottest expert")[2]
    assert re.findall(r"layer (\d), expert (\d)", card)[:2] == [("4", "6"), ("2", "3")]
    assert "1.49 ×" in card


def test_page_says_what_the_reader_must_know(tmp_path, capsys):
    info = run_info(forced_routing="HotRank <b>0.5</b>", resumed_at=(2,), expert_bias=None)
    folder = write_run(tmp_path / "<script>alert(1)", info, 3)
    file = folder / "moe_load.arrow"
    file.write_bytes(file.read_bytes()[:-5])
    page = page_of(folder)
    assert "Forced routing: HotRank <b>0.5</b>." in page.visible, "escaped"
    assert "<script>alert(1)" in page.visible, "escaped"
    (damage,) = read_trace(folder).damage
    assert damage in page.visible and damage in capsys.readouterr().out
    assert "resumed at 2" in page.visible and "off" in page.visible


def test_no_card_and_no_chart_of_what_one_rank_cannot_have(tmp_path):
    info = run_info(2, 4, 1, ep=1, world_size=1, pp=1, dp_shard=1, schedule=None, losses={})
    writer = TraceWriter(tmp_path, info)
    names = ("avg_overload_factor", "max_overload_factor")
    for step, load in enumerate(step_loads(info, 6), start=1):
        overload = {name: np.ones(2) for name in names}
        learning = {"loss": np.nan, "max_cum_overload_factor": 1.0}
        columns = load.layer_columns | overload, load.step_columns | learning
        changes = dict(zip(("layer_columns", "step_columns"), columns, strict=True))
        writer.write(step, dataclasses.replace(load, **changes))
    page = page_of(tmp_path)
    cards = re.findall(r'<div class="card"><h3>(.*?)</h3>', page.html)
    assert cards == ["MaxVio", "Hottest expert", "Dead experts"]
    titles = [figure["layout"]["yaxis"]["title"]["text"] for one in page.charts for figure in one]
    assert "loss" not in titles and "tokens / balanced" not in titles and "MaxVio" in titles


def test_dead_experts_are_counted_where_they_are(tmp_path):
    """Of the last step, 2 in layer 3 and 1 in layer 2."""
    counts_SME = np.full((6, 4, 8), 100)
    counts_SME[-1, 1, 3] = 0
    counts_SME[-1, 2, 5:7] = 0
    run = rewritten(write_run(tmp_path, run_info(), 6), counts_SME)
    page = page_of(run)
    assert "Dead experts 3 of 32 2 in layer 3, 1 in layer 2; most: 3 at step 6" in spaced(page)
    (idle,) = [f for one in page.charts for f in one if f["data"][0]["name"] == "dead"]
    assert curve(idle, "dead")[1].tolist() == [0, 0, 0, 0, 0, 3]


def test_a_resumption_is_marked_in_the_curves(tmp_path):
    for first, last in ((1, 6), (5, 9)):
        writer = TraceWriter(tmp_path, run_info())
        for step, load in enumerate(step_loads(run_info(), 9), start=1):
            if first <= step <= last:
                writer.write(step, load)
        writer.close()
    page = page_of(tmp_path)
    assert page.charts
    for figure in (figure for figures in page.charts for figure in figures):
        assert [(line["x0"], line["x1"]) for line in figure["layout"]["shapes"]] == [(5, 5)]


HOSTILE = '<script>alert("1")</script><b>%{y}'


def test_metric_of_ones_own_is_a_chart_and_any_name_is_inert(tmp_path):
    own = (
        Column(HOSTILE, summary="sum", description="What <i>I</i> measured."),
        Column("of_the_step", per="step", description="One number."),
        Column("never_recorded"),
    )
    info = run_info(3, 8, columns=(*COLUMNS, *own), losses={}, model=HOSTILE)
    writer = TraceWriter(tmp_path, info)
    for step, load in enumerate(step_loads(info, 5), start=1):
        mine = {HOSTILE: np.arange(3.0) + step}
        writer.write(
            step,
            dataclasses.replace(
                load,
                layer_columns=load.layer_columns | mine,
                step_columns=load.step_columns | {"of_the_step": 10.0 * step},
            ),
        )
    page = page_of(tmp_path)
    assert HOSTILE in page.visible and "What <i>I</i> measured." in page.visible
    assert "never_recorded" not in page.visible
    (mine,), (of_the_step,) = page.charts[-2:]
    np.testing.assert_allclose(curve(mine, "sum")[1], [6, 9, 12, 15, 18])
    np.testing.assert_allclose(curve(mine, "layer 2")[1], [2, 3, 4, 5, 6])
    np.testing.assert_allclose(curve(of_the_step, "value")[1], [10, 20, 30, 40, 50])
    assert "script" not in json.dumps(page.charts)
    assert (tmp_path / "report.html").read_text().count("<script") == 5, "all of them ours"


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 4, 1), (3, 300, 4)])
def test_one_step_of_any_shape(shape, tmp_path):
    page = page_of(write_run(tmp_path, run_info(*shape, losses={}), 1))
    assert (len(page.data["runs"][0]["layers"]), page.data["runs"][0]["numExperts"]) == shape[:2]


def test_page_that_cannot_be_written_is_one_line(tmp_path, capsys):
    folder = write_run(tmp_path, run_info(), 2)
    with pytest.raises(SystemExit) as stop:
        report(folder, "-o", folder / "nowhere" / "page.html")
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    assert "page.html" in said and "--output" in said
