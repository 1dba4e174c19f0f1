"""Formats of numbers in sentences and tables."""

from __future__ import annotations

from typing import Any

from titan_moe_lb.commands.answer.answer import Cell

GIB = 2**30


def number(value: float, digits: int = 3) -> str:
    """Format a number to ``digits`` significant digits; larger ones as whole numbers."""
    return f"{value:,.0f}" if value >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def duration(seconds: float) -> str:
    """Format a time in seconds, or in milliseconds below 0.1 s."""
    return f"{number(seconds)} s" if seconds >= 0.1 else f"{number(seconds * 1e3)} ms"


def memory(num_bytes: float, fits: bool) -> Cell:
    """Format bytes in GiB, marked with ``!`` if they do not fit."""
    gib = num_bytes / GIB
    return Cell(value=gib, text=number(gib) + ("" if fits else " !"), is_bad=not fits)


def share(value: float) -> str:
    """Format a share in percent; 0 is "none"."""
    return f"{100 * value:.3g} %" if value else "none"


def decimals(places: int) -> Any:
    """Return a format with ``places`` digits after the point."""
    return f"{{:,.{places}f}}".format
