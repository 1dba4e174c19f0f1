"""Cards at the top of a page; ``cards.html.jinja`` draws them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Card:
    """Number with its label and a note."""

    label: str
    value: str
    note: str
