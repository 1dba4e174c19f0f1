"""Damage to a sound file: cut, flipped or moved bytes, and invalid values."""

from __future__ import annotations

import copy
import datetime
from typing import Any

from hypothesis import strategies as st

HOSTILE_TEXT = (
    "",
    "none",
    "<script>hostile()</script>",
    '"><img src=x onerror=hostile()>',
    "</script><script>hostile()</script>",
    "{{ 7 * 7 }}",
    "%s %(name)s {0} {}",
    "two\nlines\r\nand a bell\x07",
    "\x1b[2J\x1b]0;title\x07",
    "../../../../etc/passwd",
    "/proc/self/mem",
    "\u202eleft\u0000over",
    "e\u0301\U0001f4a5" * 8,
    "n" * 5000,
)
_NUMBERS = (0, -1, 1, 3, 7, 2**31 - 1, 2**31, 2**63 - 1, -(2**63), 10**12, 10**40)
_FLOATS = (0.0, -0.0, 0.5, -1e-30, 1e308, float("inf"), float("-inf"), float("nan"))

_texts = st.sampled_from(HOSTILE_TEXT) | st.text(max_size=12)
_scalars = (
    _texts
    | st.sampled_from(_NUMBERS)
    | st.integers(-(2**70), 2**70)
    | st.sampled_from(_FLOATS)
    | st.floats()
    | st.booleans()
)
VALUES = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_texts, inner, max_size=4),
    max_leaves=6,
)
"""Values that JSON and TOML can express."""
MOMENTS = st.sampled_from([datetime.date(2026, 1, 2), datetime.time(3, 4), datetime.datetime.max])
"""Values that only TOML can express."""


def _like(value: Any) -> st.SearchStrategy:
    """Other values of the same type, which are noticed later."""
    if isinstance(value, str):
        return _texts
    if isinstance(value, bool) or value is None:
        return st.sampled_from([True, False])
    if isinstance(value, int):
        return st.sampled_from(_NUMBERS) | st.integers(-2, 300)
    return st.sampled_from(_FLOATS) if isinstance(value, float) else VALUES


@st.composite
def trees(draw: st.DrawFn, sound: dict[str, Any], values: st.SearchStrategy = VALUES) -> dict:
    """Generate a table with up to three values, at any depth, changed, renamed, removed or
    added."""
    tree = copy.deepcopy(sound)
    for _ in range(draw(st.integers(1, 3))):
        node: Any = tree
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            inner = node[key]
            if isinstance(inner, (dict, list)) and inner and draw(st.integers(0, 3)):
                node = inner
                continue
            what = draw(st.sampled_from(["change", "change", "remove", "add", "rename"]))
            if what == "change":
                node[key] = draw(_like(inner) | values)
            elif what == "remove":
                del node[key]
            elif isinstance(node, list):
                node.append(draw(values))
            elif what == "add":
                node[draw(_texts)] = draw(values)
            else:
                node[draw(_texts)] = node.pop(key)
            break
    return tree


@st.composite
def damaged(draw: st.DrawFn, sound: bytes) -> bytes:
    """Generate the bytes of a sound file with one to four damages, most of them near its start."""
    content = bytearray(sound)
    place = st.integers(0, max(len(sound) - 1, 0)) | st.integers(0, min(len(sound), 2000))
    for _ in range(draw(st.integers(1, 4))):
        start = min(draw(place), len(content))
        length = draw(st.integers(1, 16))
        what = draw(
            st.sampled_from(["flip", "flip", "flip", "write", "cut", "drop", "put", "copy"])
        )
        if what == "flip" and start < len(content):
            content[start] ^= 1 << draw(st.integers(0, 7))
        elif what == "write":
            content[start : start + length] = draw(st.binary(min_size=1, max_size=16))
        elif what == "cut":
            del content[start:]
        elif what == "drop":
            del content[start : start + length]
        elif what == "put":
            content[start:start] = draw(st.binary(min_size=1, max_size=16))
        elif what == "copy":
            content[start:start] = content[draw(place) :][: 8 * length]
    return bytes(content)
