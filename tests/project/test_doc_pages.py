"""Tests of the form of the documentation: navigation, links, anchors, images, lengths.

``mkdocs build --strict`` refuses most of this too, but mkdocs is in the extra ``docs``.
"""

from __future__ import annotations

import pkgutil
import re
from pathlib import Path

import pytest
import yaml

import titan_moe_lb
from tests.support import doc_examples
from tests.support.doc_examples import PAGES, ROOT

MOST_LINES = {"README.md": 120, "CHANGELOG.md": 10_000}
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)\)")
HTML_IMAGE = re.compile(r"<img [^>]*>")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    return FENCE.sub("", text)


def anchors(text: str) -> set[str]:
    """Anchors of the headings, as Python-Markdown makes them."""
    heads = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", head).strip().lower() for head in heads)
    return {re.sub(r"[-\s]+", "-", head) for head in plain}


def faults(path: Path, text: str) -> list[str]:
    """List the faults in the form of a page."""
    found = []
    if len(text.splitlines()) > MOST_LINES.get(path.name, 250):
        found.append("too long")
    for target in LINK.findall(prose(text)):
        file, _, anchor = target.partition("#")
        if "://" in target:
            continue
        page = path.parent / file
        exists = page.exists()
        if anchor and exists:
            exists = anchor in anchors(page.read_text() if file else text)
        if not exists:
            found.append(target)
    for alt, file in IMAGE.findall(prose(text)):
        if len(alt) < 20 or not (path.parent / file).is_file():
            found.append(f"image {file}: needs an alternative text and a file")
    for tag in HTML_IMAGE.findall(prose(text)):
        alt, file = (re.search(rf'{key}="([^"]*)"', tag) for key in ("alt", "src"))
        if not (alt and len(alt[1]) >= 20 and file and (path.parent / file[1]).is_file()):
            found.append(tag)
    return found


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_page(path):
    assert not faults(path, path.read_text())


@pytest.mark.parametrize(
    "text",
    [
        "[here](nowhere.md)",
        "[here](README.md#nowhere)",
        "[here](#nowhere)",
        "![](docs/pictures/batch_cut.svg)",
        "![A picture that does not exist](nothing.svg)",
        '<img src="docs/pictures/batch_cut.svg">',
        "\n" * 300,
    ],
)
def test_a_wrong_page_fails(text):
    assert faults(ROOT / "some.md", text)


def leaves(nav: list | dict | str) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [leaf for part in parts for leaf in leaves(part)]


def test_navigation_has_every_page():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    folder = ROOT / "docs"
    pages = [str(path.relative_to(folder)) for path in folder.rglob("*.md")]
    assert sorted(leaves(site["nav"])) == sorted(pages)


def test_every_picture_is_shown():
    shown = " ".join(path.read_text() for path in PAGES)
    for picture in (ROOT / "docs").rglob("*"):
        if picture.suffix in (".svg", ".png"):
            assert picture.name in shown, picture


def test_api_page():
    """The page documents existing names; a Python block of some page uses every public name."""
    page = (ROOT / "docs/reference/api.md").read_text()
    documented = re.findall(r"^::: (\S+)$", page, re.MULTILINE)
    assert documented and all(pkgutil.resolve_name(name) for name in documented)
    code = " ".join(b.text for b in doc_examples.blocks() if b.language == "python")
    assert not set(titan_moe_lb.__all__) - set(re.findall(r"\w+", code))
