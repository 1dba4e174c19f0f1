"""Tests of the contrast of pages in both themes, by the formula of WCAG 2.2."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import titan_moe_lb
from titan_moe_lb.pages import palette
from titan_moe_lb.pages.charts import MARKS, PENS, add_curve, blank_figure, label_curves

PACKAGE = Path(titan_moe_lb.__file__).parent
THEMES = {"light": palette.LIGHT, "dark": palette.DARK}
TEXT, MARK = 4.5, 3.0

RAMP = [f"ramp-{index}" for index in range(palette.RAMP_LENGTH)]
HUES = ["blue", "orange", "green", "violet", "red", "grey"]
# What is drawn or written, and on what. A curve's colour is that of its name at its end.
PAIRS = [
    *((TEXT, role, behind) for role in ("ink", "soft", "bad") for behind in ("paper", "surface")),
    *((TEXT, role, "surface") for role in [*HUES, *RAMP]),
    (TEXT, "on-accent", "accent"),
    (TEXT, "warning-ink", "warning-paper"),
    (TEXT, "cross", "dead"),
    *((MARK, role, behind) for role in ("accent", "edge") for behind in ("paper", "surface")),
    # Between the ends of the map's scale and its middle.
    (MARK, "load-0", "load-2"),
    (MARK, "load-4", "load-2"),
    # The frame of the picked expert has two colours: one of them is seen on any cell.
    (MARK, "ink", "surface"),
]


def luminance(color: str) -> float:
    """Relative luminance of linear sRGB, weighted by the eye's sensitivity to each channel."""
    linear = []
    for channel in bytes.fromhex(color.removeprefix("#")):
        share = channel / 255
        linear.append(share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4)
    red, green, blue = linear
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_formula_is_that_of_the_standard():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#ffffff", "#767676") == pytest.approx(4.54, abs=0.005)
    assert contrast("#ff0000", "#ffffff") == pytest.approx(4.0, abs=0.005)


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize(("least", "role", "behind"), PAIRS)
def test_contrast(theme, least, role, behind):
    colors = THEMES[theme]
    assert contrast(colors[role], colors[behind]) >= least


@pytest.mark.parametrize("theme", THEMES)
def test_every_cell_of_the_map_is_seen_in_its_frame(theme):
    colors = THEMES[theme]
    for role in [f"load-{index}" for index in range(5)] + ["dead"]:
        frame = max(contrast(colors[line], colors[role]) for line in ("ink", "surface"))
        assert frame >= MARK, role


def test_themes_have_the_same_roles_and_all_that_is_used_are_there():
    assert palette.LIGHT.keys() == palette.DARK.keys()
    text = "".join(
        path.read_text() for path in PACKAGE.rglob("*") if path.suffix in (".css", ".jinja", ".js")
    )
    used = set(re.findall(r"var\(--([\w-]+)\)", text))
    used |= {pen.color[len("var(--") : -1] for pen in PENS}
    assert used and used <= palette.LIGHT.keys()


def test_pages_name_colours_by_role_alone():
    colored = re.compile(r"#[0-9a-fA-F]{6}\b|\"#[0-9a-fA-F]{3}\"")
    files = [path for room in ("pages", "commands") for path in (PACKAGE / room).rglob("*.*")]
    literal = {path.name for path in files if colored.search(path.read_text(errors="ignore"))}
    assert literal <= {"palette.py"}


def test_names_of_many_curves_stay_in_the_figure_and_apart():
    figure = blank_figure("y")
    for number, pen in enumerate(PENS):
        add_curve(figure, str(number), np.array([1, 2]), np.array([0.0, number % 3]), pen)
    label_curves(figure)
    heights = np.sort([note.y for note in figure.layout.annotations])
    assert len(heights) == 30 and heights[0] >= 0 and heights[-1] <= 1
    assert np.diff(heights).min() > 0.03


def test_pens_are_told_apart_without_their_hue():
    assert len({(pen.color, pen.dash) for pen in PENS}) == len(PENS) == len({*MARKS}) == 30
    for one, other in zip(PENS, PENS[1:], strict=False):
        assert one.dash != other.dash and one.color != other.color
