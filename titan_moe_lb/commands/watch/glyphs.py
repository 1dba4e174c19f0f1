"""Characters for a terminal, in Unicode or in ASCII."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from rich.console import Console


@dataclass(frozen=True, slots=True)
class Glyphs:
    """Characters of a frame, readable without colour."""

    bars: str
    """Characters for loads, ascending; the fourth is balance."""
    dead: str
    """Character for an expert without tokens."""
    overflow: Literal["ellipsis", "crop"]
    """rich's method to shorten a line that is too long."""

    def inert(self, text: str) -> str:
        """Remove control characters, and replace characters that the terminal cannot show."""
        printable = "".join(letter for letter in text if letter.isprintable())
        return printable if self is UNICODE else printable.encode("ascii", "replace").decode()


UNICODE = Glyphs("▁▂▃▄▅▆▇█", "·", "ellipsis")
ASCII = Glyphs("_.-=+*%#", "x", "crop")


def glyphs_of(console: Console) -> Glyphs:
    """Choose the glyphs that the console can show.

    Python uses UTF-8 even in the C locale (PEP 538, PEP 540). So the encoding alone does not
    decide: Unicode also needs a locale other than C and POSIX.
    """
    locale = os.environ.get("LC_ALL") or os.environ.get("LANG")
    unicode = console.encoding.startswith("utf") and locale not in ("C", "POSIX")
    return UNICODE if unicode else ASCII
