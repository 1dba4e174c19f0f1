"""The settings of a study as rows: on its page, and shorter on the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from titan_moe_lb.commands.study.results import Group, Setting, Spread

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
_SHORT_TITLES = {"validation_loss": "loss", "steps_until_balanced": "balanced at"}
"""They leave room for the names of the settings."""


def columns(group: Group) -> dict[str, str]:
    """Those that some setting has."""
    return {number: title for number, title in COLUMNS.items() if group.knows(number)}


def row(setting: Setting, numbers: Sequence[str]) -> list[tuple[str, str]]:
    """The mean over the seeds in words, and the lowest and highest where they differ."""
    spreads = [setting.spread(number) for number in numbers]
    return [(in_words(spread), range_in_words(spread)) for spread in spreads]


def in_words(spread: Spread) -> str:
    """The mean over the seeds; what never happened to some of them has none."""
    if math.isnan(spread.mean):
        return "–"
    if math.isinf(spread.high):
        return "never" if math.isinf(spread.low) else f"{_number(spread.low)} or never"
    return _number(spread.mean)


def range_in_words(spread: Spread) -> str:
    """The lowest and highest; empty where they do not differ."""
    low, high = _number(spread.low), _number(spread.high)
    return f"{low} to {high}" if math.isfinite(spread.high) and low != high else ""


def outcome(setting: Setting) -> str:
    """What became of its cells, where not all came to a good end."""
    bad = [result.record.status for result in setting.results if result.measured is None]
    return ", ".join(f"{bad.count(status)} {status}" for status in dict.fromkeys(bad))


def print_table(groups: Sequence[Group]) -> None:
    """On the terminal, the settings of one model below one another: what decides alone."""
    console = Console()
    for group in groups:
        numbers = [name for name in (group.loss, *_ON_TERMINAL) if group.knows(name)]
        table = Table(
            box=box.SIMPLE, title=Text(group.name) if group.name else None, title_justify="left"
        )
        table.add_column("setting", overflow="fold", min_width=16)
        for name in numbers:
            table.add_column(_SHORT_TITLES.get(name, COLUMNS[name]), justify="right", no_wrap=True)
        for setting in group.settings:
            note = outcome(setting)
            title = f"{setting.name} ({note})" if note else setting.name
            table.add_row(Text(title), *(_short(setting.spread(name)) for name in numbers))
        console.print(table)


def _short(spread: Spread) -> str:
    """The mean, and half of the range of the seeds."""
    if not range_in_words(spread):
        return in_words(spread)
    half = (spread.high - spread.low) / 2
    return f"{in_words(spread)} ±{half:{'.0f' if half >= 1 else '.1g'}}"


def _number(value: float) -> str:
    """Three digits after the point of what is 1 or more, as a loss is; else three that count."""
    if not math.isfinite(value):
        return "never"
    if value == int(value):
        return f"{value:.0f}"
    return f"{value:.4g}" if abs(value) >= 1 else f"{value:.3g}"
