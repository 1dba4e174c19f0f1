"""The settings of a study as rows: on its page, and shorter on the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from titan_moe_lb.study.results import Group, Setting, Spread

COLUMNS = {
    "validation_loss": "validation loss",
    "training_loss": "training loss",
    "max_violation": "MaxVio",
    "micro_batch_max_violation": "MaxVio of a micro-batch",
    "steps_until_balanced": "steps until balanced",
    "specialisation": "specialisation",
    "step_slowdown": "step x",
    "step_seconds": "step s",
}
"""Numbers of a setting and their titles."""

_ON_TERMINAL = ("max_violation", "steps_until_balanced", "step_slowdown")


def columns(group: Group) -> dict[str, str]:
    """Those that some setting has."""
    return {number: title for number, title in COLUMNS.items() if group.knows(number)}


def row(setting: Setting, numbers: Sequence[str]) -> list[str]:
    """The mean over the seeds, and the lowest and highest where they differ."""
    return [in_words(setting.spread(number)) for number in numbers]


def in_words(spread: Spread) -> str:
    if math.isnan(spread.mean):
        return "–"
    if math.isinf(spread.high):
        return "never" if math.isinf(spread.low) else f"{_number(spread.low)} or never"
    if _number(spread.low) == _number(spread.high):
        return _number(spread.mean)
    return f"{_number(spread.mean)} ({_number(spread.low)} to {_number(spread.high)})"


def outcome(setting: Setting) -> str:
    """What became of its cells, where not all came to a good end."""
    bad = [result.record.status for result in setting.results if result.measured is None]
    return ", ".join(f"{bad.count(status)} {status}" for status in dict.fromkeys(bad))


def print_table(groups: Sequence[Group]) -> None:
    """On the terminal, the settings of one model below one another: what decides alone."""
    console = Console()
    for group in groups:
        known = columns(group)
        numbers = [name for name in (group.loss, *_ON_TERMINAL) if name in known]
        table = Table(box=box.SIMPLE, title=group.name or None, title_justify="left")
        table.add_column("setting", overflow="fold", min_width=16)
        for name in numbers:
            table.add_column(known[name], justify="right")
        for setting in group.settings:
            note = outcome(setting)
            title = f"{setting.name} ({note})" if note else setting.name
            table.add_row(Text(title), *(_short(setting.spread(name)) for name in numbers))
        console.print(table)


def _short(spread: Spread) -> str:
    """The mean, and half of the range of the seeds."""
    half = (spread.high - spread.low) / 2
    if not math.isfinite(half) or _number(spread.low) == _number(spread.high):
        return in_words(spread)
    return f"{_number(spread.mean)} ±{half:.1g}"


def _number(value: float) -> str:
    if math.isinf(value):
        return "never"
    return f"{value:.0f}" if value == int(value) else f"{value:.4g}"
