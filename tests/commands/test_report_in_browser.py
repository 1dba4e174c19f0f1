"""Tests of the report's script in a real browser: it shows the data of the trace."""

from __future__ import annotations

import base64
import re
import zlib

import numpy as np
import pytest

from tests.support import browser
from tests.support.synthetic_trace import rewritten, run_info, write_run
from titan_moe_lb import cli
from titan_moe_lb.pages import palette
from titan_moe_lb.traces.trace import read_trace

# The page promises colours and values to within 4.5%; half of that each way.
ROUNDING = 0.045

READ = """
const read = () => ({
  step: document.getElementById("step").textContent,
  heatmaps: [...document.querySelectorAll("[id^=heatmap-]")].map((plot) => plot.data[0]).map(
    ({ z, text }) => ({ z, loads: text.map((row) => row.map(Number)) })),
});
const slider = document.getElementById("slider");
await until(() => document.getElementById("step").textContent);
"""


def loads(folder) -> np.ndarray:
    """Loads relative to balance ``(S, M, E)``, from the trace alone."""
    counts_SME = read_trace(folder).counts_SME
    return counts_SME / counts_SME.mean(axis=2, keepdims=True)


def check(heatmap: dict, expected_ME: np.ndarray) -> None:
    np.testing.assert_allclose(heatmap["loads"], expected_ME, rtol=ROUNDING + 0.05, atol=0)
    alive = expected_ME > 0
    z_ME = np.array(heatmap["z"], dtype=float)
    octaves = np.clip(np.log2(expected_ME[alive]), -2, 2)
    np.testing.assert_allclose(z_ME[alive], octaves, atol=np.log2(1 + ROUNDING))
    assert (z_ME[~alive] < -2).all(), "an expert without tokens has the colour of a starved one"


def test_slider_buttons_and_a_click(tmp_path):
    folder = write_run(tmp_path, run_info(), 12, every=10)
    cli.main(["report", str(folder)])
    shown = browser.act(
        folder / "report.html",
        READ
        + """
        const states = [read()];
        const move = (value) => { slider.value = value; slider.dispatchEvent(new Event("input")); };
        for (const value of [0, 5]) { move(value); states.push(read()); }
        document.getElementById("next").click(); states.push(read());
        document.getElementById("previous").click();
        document.getElementById("previous").click(); states.push(read());

        const heatmap = document.getElementById("heatmap-0");
        const follow = () => ({
          y: [...document.getElementById("course").data[0].y],
          x: document.getElementById("course").data[0].x,
          frame: heatmap.layout.shapes.map(({ x0, x1, y0, y1 }) => [x0, x1, y0, y1]),
          picked: document.getElementById("picked").textContent,
        });
        const hottest = follow();
        heatmap.emit("plotly_click", { points: [{ pointIndex: [2, 5] }] });
        const clicked = follow();
        const [layer, expert] = ["layer", "expert"].map((id) => document.getElementById(id));
        const fields = [layer.selectedOptions[0].textContent, expert.value];
        layer.value = 1; layer.dispatchEvent(new Event("input"));
        expert.stepUp(); expert.dispatchEvent(new Event("input"));
        const typed = follow();
        expert.value = 8; expert.dispatchEvent(new Event("input"));
        const beyond = follow();

        const plots = [...document.querySelectorAll(".plot")];
        await until(() => plots.every((plot) => plot.querySelector("svg.main-svg")));
        const warnings = document.querySelectorAll("p.warning").length;
        return { states, hottest, clicked, fields, typed, beyond, plots: plots.length, warnings };
        """,
    )
    expected_SME = loads(folder)
    for state, index in zip(shown["states"], (11, 0, 5, 6, 4), strict=True):
        assert state["step"] == f"step {1 + 10 * index}"
        (heatmap,) = state["heatmaps"]
        check(heatmap, expected_SME[index])
    assert not np.allclose(expected_SME[0], expected_SME[5], rtol=0.2), "the steps differ"

    hottest = np.unravel_index(expected_SME[-1].argmax(), expected_SME[-1].shape)
    assert shown["fields"] == ["3", "5"]
    for state, (layer, expert) in (
        (shown["hottest"], hottest),
        (shown["clicked"], (2, 5)),
        (shown["typed"], (0, 6)),
        (shown["beyond"], (0, 6)),  # there is no expert 8
    ):
        assert state["x"] == list(range(1, 112, 10))
        np.testing.assert_allclose(state["y"], expected_SME[:, layer, expert], rtol=ROUNDING)
        assert state["frame"] == 2 * [[expert - 0.5, expert + 0.5, layer - 0.5, layer + 0.5]]
        now = float(state["picked"].removesuffix(" × balanced"))
        assert now == pytest.approx(expected_SME[4, layer, expert], rel=ROUNDING + 0.05)
    assert shown["plots"] > 2 and shown["warnings"] == 0


def test_a_finding_leads_to_its_expert_and_crosses_fill_their_cells(tmp_path):
    counts_SME = np.full((12, 4, 8), 1000)
    counts_SME[:, 2, 5] = 0
    folder = rewritten(write_run(tmp_path, run_info(), 12), counts_SME)
    cli.main(["report", str(folder)])
    shown = browser.act(
        folder / "report.html",
        READ
        + """
        const [layer, expert] = ["layer", "expert"].map((id) => document.getElementById(id));
        layer.value = 1; expert.value = 0; layer.dispatchEvent(new Event("input"));
        const before = document.getElementById("picked").textContent;
        const link = document.querySelector(".finding a");
        link.click();
        const heatmap = document.getElementById("heatmap-0");
        return [before, link.textContent, layer.value, expert.value,
          document.getElementById("picked").textContent, location.hash, heatmap.data[1].marker.size,
          document.querySelector(link.getAttribute("href")) !== null];
        """,
    )
    before, text, layer, expert, picked, place, size, exists = shown
    assert before == "1.0 × balanced" and text == "layer 3, expert 5"
    assert (layer, expert, picked, place, exists) == ("3", "5", "0.0 × balanced", "#map", True)
    assert size > 10, "8 experts are wider than the largest cross"


def test_two_runs_move_together_to_the_nearest_logged_step(tmp_path):
    """One run logs each step, the other every third."""
    first = write_run(tmp_path / "a", run_info(), 10)
    second = write_run(tmp_path / "b", run_info(), 4, seed=3, every=3)
    cli.main(["report", str(first), str(second)])
    shown = browser.act(
        first / "compare.html",
        READ + 'slider.value = 4; slider.dispatchEvent(new Event("input")); return read();',
    )
    assert shown["step"] == "A: step 5, B: step 4"
    for heatmap, expected_ME in zip(
        shown["heatmaps"], (loads(first)[4], loads(second)[1]), strict=True
    ):
        check(heatmap, expected_ME)


@pytest.mark.parametrize("kind, form", [("drifting", 1), ("independent", 0)])
def test_every_step_of_loads_that_drift_and_that_do_not(kind, form, tmp_path):
    """A page embeds loads in two forms: as differences from step to step, and as they are."""
    folder = write_run(tmp_path, run_info(8, 64, global_batch_size=64), 40)
    if kind == "independent":
        random = np.random.default_rng(0)
        spread_SME = np.exp(0.4 * random.standard_normal((40, 8, 64)))
        folder = rewritten(folder, random.poisson(256 * spread_SME))
    cli.main(["report", str(folder)])
    embedded = re.search(r'id="loads-0">([^<]+)<', (folder / "report.html").read_text())[1]
    assert zlib.decompress(base64.b64decode(embedded))[0] == form
    shown = browser.act(
        folder / "report.html",
        READ
        + """
        const heatmaps = [];
        for (slider.value = 0; ; slider.value = Number(slider.value) + 1) {
          slider.dispatchEvent(new Event("input"));
          heatmaps.push(read().heatmaps[0]);
          if (slider.value === slider.max) return heatmaps;
        }
        """,
    )
    loads_SME = loads(folder)
    shown_SME = np.where(loads_SME > 0, loads_SME.clip(min=1 / 16), 0)  # the lowest code
    for heatmap, expected_ME in zip(shown, shown_SME, strict=True):
        check(heatmap, expected_ME)


def hex_of(color: str) -> str:
    """Convert a browser's ``rgb(1, 2, 3)`` to a hexadecimal colour."""
    return "#" + bytes(map(int, re.findall(r"\d+", color)[:3])).hex()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_colours_are_those_of_the_theme_and_a_narrow_page_does_not_scroll_sideways(tmp_path, dark):
    first = write_run(tmp_path / "a", run_info(2, 8), 10)
    loads_SME = read_trace(first).counts_SME.copy()
    loads_SME[-1, 1, 3] = 0
    second = rewritten(first, loads_SME)
    cli.main(["report", str(first), str(second)])
    shown = browser.act(
        first / "compare.html",
        READ
        + """
        const plots = [...document.querySelectorAll(".plot")];
        await until(() => plots.every((plot) => plot.querySelector("svg.main-svg")));
        const of = (element, property) => getComputedStyle(element)[property];
        const [map, crosses] = document.getElementById("heatmap-1").data;
        document.documentElement.style.width = "400px";
        dispatchEvent(new Event("resize"));
        await until(() => document.querySelector("main").clientWidth <= 400);
        await until(() => plots.every((plot) =>
          plot.querySelector("svg.main-svg").getBoundingClientRect().right <= 401));
        const wide = [...document.querySelectorAll("main *")].filter((element) =>
          !element.closest(".wide > *") && element.getBoundingClientRect().right > 401);
        return {
          paper: of(document.body, "backgroundColor"), ink: of(document.body, "color"),
          line: of(document.querySelector("#chart-0-1 .scatterlayer .js-line"), "stroke"),
          label: of(document.querySelector("#chart-0-1 .annotation-text"), "fill"),
          middle: map.colorscale[4][1], crosses: [crosses.x, crosses.y],
          wide: wide.map((element) => element.className.baseVal ?? element.className),
          named: [...document.querySelectorAll("input, select, button, .plot, .wide")].every(
            (element) => element.ariaLabel || element.labels?.length),
        };
        """,
        dark=dark,
    )
    colors = palette.DARK if dark else palette.LIGHT
    assert hex_of(shown["paper"]) == colors["paper"]
    assert hex_of(shown["ink"]) == colors["ink"]
    assert hex_of(shown["line"]) == hex_of(shown["label"]) == colors["blue"]
    assert shown["middle"] == colors["load-2"]
    assert shown["crosses"] == [[3], ["2"]], "the expert that got nothing"
    assert shown["wide"] == [] and shown["named"]


def test_an_error_on_the_page_fails_the_test(tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<html><body><p>1</p></body></html>")
    with pytest.raises(AssertionError, match="is not defined"):
        browser.act(page, "return nowhere;")
