"""Characters of a terminal: bars in Unicode, or in ASCII."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from rich.console import Console


@dataclass(frozen=True, slots=True)
class Glyphs:
    """Letters of a picture. Low bars starve, high bars are overloaded, the fourth is balance:
    readable without colour."""

    bars: str
    dead: str
    overflow: Literal["ellipsis", "crop"]
    """End of a line that is too long."""

    def inert(self, text: str) -> str:
        """The text without what a terminal would obey, or could not show."""
        printable = "".join(letter for letter in text if letter.isprintable())
        return printable if self is UNICODE else printable.encode("ascii", "replace").decode()


UNICODE = Glyphs("▁▂▃▄▅▆▇█", "·", "ellipsis")
ASCII = Glyphs("_.-=+*%#", "x", "crop")


def glyphs_of(console: Console) -> Glyphs:
    """Glyphs that the console can show.

    In the C locale Python writes UTF-8 all the same (PEP 538, PEP 540), so that the environment
    decides, not the encoding.
    """
    locale = os.environ.get("LC_ALL") or os.environ.get("LANG")
    unicode = console.encoding.startswith("utf") and locale not in ("C", "POSIX")
    return UNICODE if unicode else ASCII
