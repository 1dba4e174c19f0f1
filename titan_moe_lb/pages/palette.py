"""Colours of every page, in a light and a dark theme.

Style sheet and charts name colours by role, as in ``var(--ink)``. :func:`css` defines the roles in
both themes. The page redraws its charts if the reader changes the theme.
``tests/project/test_palette.py`` checks contrasts: 4.5 to 1 for text, 3 to 1 for lines and marks.
"""

from __future__ import annotations

import numpy as np

LIGHT = {
    "paper": "#faf9f6",
    "surface": "#ffffff",
    "ink": "#2b2f36",
    "soft": "#5c626b",
    "line": "#dedbd3",
    "edge": "#7f848c",
    "grid": "#e9e6df",
    "accent": "#2a5d9f",
    "on-accent": "#ffffff",
    "bad": "#b3261e",
    "warning-paper": "#fff1d6",
    "warning-ink": "#6b3a00",
    "blue": "#2a5d9f",
    "orange": "#b4530a",
    "green": "#2b7350",
    "violet": "#7d4aa8",
    "red": "#c0281f",
    "grey": "#686e77",
    "load-0": "#0b3c7d",
    "load-1": "#5b9bd0",
    "load-2": "#f1eee6",
    "load-3": "#ee9668",
    "load-4": "#b92d1c",
    "dead": "#000000",
    "cross": "#ffffff",
}
"""Role to colour in the light theme.

``soft`` is for secondary text, ``line`` and ``grid`` for decoration, ``edge`` for the borders of
controls. ``load-0`` is for starved experts, ``load-2`` for balanced ones, ``load-4`` for
overloaded ones.
"""

DARK = {
    "paper": "#131519",
    "surface": "#1c1f24",
    "ink": "#eae8e3",
    "soft": "#a9afb8",
    "line": "#363b43",
    "edge": "#7b818b",
    "grid": "#2d3239",
    "accent": "#82b3f0",
    "on-accent": "#10131a",
    "bad": "#ff8f85",
    "warning-paper": "#352a12",
    "warning-ink": "#f6cd8c",
    "blue": "#82b3f0",
    "orange": "#f0a24f",
    "green": "#6fc79a",
    "violet": "#c9a5f0",
    "red": "#ff8a80",
    "grey": "#a5abb4",
    "load-0": "#7cc0ff",
    "load-1": "#4a7eb0",
    "load-2": "#30353d",
    "load-3": "#b0603c",
    "load-4": "#ff9b73",
    "dead": "#000000",
    "cross": "#ffffff",
}
"""Role to colour in the dark theme."""

RAMP_LENGTH = 8
"""Number of colours in the ramp."""


def _ramp(low: str, high: str) -> dict[str, str]:
    """Interpolate the colours ``ramp-0`` to ``ramp-7`` for things with an order, such as layers."""
    first, last = (np.array(list(bytes.fromhex(end[1:]))) for end in (low, high))
    shares = np.linspace(0.0, 1.0, RAMP_LENGTH)[:, None]
    steps = (first + shares * (last - first)).round().astype(np.uint8)
    return {f"ramp-{index}": f"#{step.tobytes().hex()}" for index, step in enumerate(steps)}


LIGHT |= _ramp("#4b2a8c", "#14807a")
DARK |= _ramp("#a48bf0", "#8fe3b0")


def color(role: str) -> str:
    """Return the CSS reference to a role, for style sheets and charts."""
    return f"var(--{role})"


def ramp(index: int, length: int) -> str:
    """Return the colour of one of ``length`` ordered things."""
    return color(f"ramp-{round(index / max(1, length - 1) * (RAMP_LENGTH - 1))}")


def css() -> str:
    """Define the roles as CSS properties, in the theme that the reader prefers."""

    def properties(theme: dict[str, str]) -> str:
        return ":root { " + " ".join(f"--{role}: {value};" for role, value in theme.items()) + " }"

    return (
        ":root { color-scheme: light dark; }\n"
        f"{properties(LIGHT)}\n@media (prefers-color-scheme: dark) {{ {properties(DARK)} }}"
    )
