"""View of a run's last step for a terminal of any width."""

from __future__ import annotations

import numpy as np
from rich.console import Group
from rich.text import Text

from titan_moe_lb.commands.diagnose.finding import Severity
from titan_moe_lb.commands.watch.follower import Follower, in_words
from titan_moe_lb.commands.watch.glyphs import UNICODE, Glyphs
from titan_moe_lb.traces.balance_statistics import (
    max_violation,
    num_dead_experts,
    relative_load,
)

# Index in Glyphs.bars of a balanced load, and bars for each factor of two.
BALANCED = 3
BARS_PER_OCTAVE = 2
# Colours (red, green, blue) at these octaves of the load; colours between are interpolated.
_OCTAVES = (-1.25, 0.0, 1.25)
_RGB = ((31, 150, 222), (100, 150, 80), (235, 155, 35))
_LINES = (
    (
        "learning",
        {
            "loss": "loss {:.4f}",
            "grad_norm": "grad norm {:.3g}",
            "tokens_per_second": "tps {:,.0f}",
            "step_seconds": "{:.3g} s/step",
            "bias_range": "bias range {:.3g}",
        },
    ),
    (
        "overload",
        {
            "avg_overload_factor": "mean {:.3f}",
            "max_overload_factor": "max {:.3f}",
            "max_cum_overload_factor": "cumulative {:.3f}",
        },
    ),
)
MOST_FINDINGS = 3
"""Most lines with findings."""
_STYLES = {Severity.FAULT: "bold red", Severity.WARNING: "bold yellow", Severity.NOTE: ""}
_WIDEST_EXPERT = 8
_LABEL, _MAX_VIOLATION = 6, 7
"""Columns before the strip (layer number) and after it (MaxVio)."""


def frame(
    follower: Follower, width: int, most_layers: int | None = None, glyphs: Glyphs = UNICODE
) -> Group:
    """Draw headline numbers, findings and a strip of loads for each layer.

    Of more layers than ``most_layers``, those with the highest MaxVio are drawn.
    """
    load = follower.load
    violation_M = max_violation(load.counts_ME)
    shown = np.arange(len(load.layers))
    if most_layers is not None and len(shown) > most_layers:
        shown = np.sort(np.argsort(-violation_M, kind="stable")[:most_layers])
    strips = [
        _strip(load.layers[row], load.counts_ME[row], violation_M[row], width, glyphs)
        for row in shown
    ]
    head = _head(follower, violation_M, width, glyphs)
    return Group(*head, *strips, _scale(len(shown), follower, width, glyphs))


def _head(follower: Follower, violation_M: np.ndarray, width: int, glyphs: Glyphs) -> list[Text]:
    load, info = follower.load, follower.info
    worst = int(violation_M.argmax())
    dead = int(num_dead_experts(load.counts_ME).sum())
    numbers = _numbers(follower)
    title = Text(glyphs.inert(info.title), style="bold")
    title.append(f"  {glyphs.inert(info.layout)}", style="default not bold")
    if info.forced_routing:
        title.append(f"  forced routing: {glyphs.inert(info.forced_routing)}", style="bold red")
    step = Text(f"step {follower.step}", style="bold")
    step.append(f"  {in_words(follower.age())} ago", style="not bold")
    of = f" of {info.num_experts_M.sum()}" if dead else ""
    step.append(f"  dead experts {dead}{of}", style="bold red" if dead else "not bold")
    for column in info.columns:
        if column.is_aux_loss and column.name in numbers:
            step.append(
                f"  {glyphs.inert(column.heading)} {numbers[column.name]:.4f}", style="not bold"
            )
    lines = [title, step]
    if late := follower.end():
        lines.append(Text(late, style="bold yellow"))
    for label, shown in _LINES:
        words = [form.format(numbers[name]) for name, form in shown.items() if name in numbers]
        if words:
            lines.append(Text(f"{label:<10}{'  '.join(words)}"))
    violation = Text(
        f"MaxVio    mean {violation_M.mean():.3f}"
        f"  worst {violation_M[worst]:.3f} (layer {load.layers[worst]})  "
    )
    violation.append(_history(follower.max_violations, width - len(violation) - 1, glyphs))
    lines.append(violation)
    lines += _findings(follower, glyphs)
    for line in lines:
        line.truncate(width, overflow=glyphs.overflow)
    columns = f"layer {'load of each expert':<{max(0, width - _LABEL - _MAX_VIOLATION)}}{'MaxVio':>{_MAX_VIOLATION}}"
    return [*lines, Text(columns, style="dim")]


def _findings(follower: Follower, glyphs: Glyphs) -> list[Text]:
    """Format the worst findings on the recent steps, the worst first."""
    found = follower.findings
    lines = [
        Text(
            glyphs.inert(f"{one.severity.name.lower():<10}{one.what}"), style=_STYLES[one.severity]
        )
        for one in found[:MOST_FINDINGS]
    ]
    if len(found) > MOST_FINDINGS:
        lines[-1].append(f"  (and {len(found) - MOST_FINDINGS} more: titan-moe-lb diagnose)")
    return lines


def _numbers(follower: Follower) -> dict[str, float]:
    """Collect every finite column of the step by name, summarised over layers."""
    load = follower.load
    of_layers = {
        column.name: float(column.over_layers(load.layer_columns[column.name]))
        for column in follower.info.columns
        if column.name in load.layer_columns
    }
    numbers = of_layers | load.step_columns
    return {name: number for name, number in numbers.items() if np.isfinite(number)}


def _strip(layer: int, counts_E: np.ndarray, violation: float, width: int, glyphs: Glyphs) -> Text:
    line = Text(f"{layer:>{_LABEL - 2}}  ", style="default")
    load_E = relative_load(counts_E[counts_E >= 0])
    room = max(1, width - _LABEL - _MAX_VIOLATION)
    columns = max(1, min(_WIDEST_EXPERT, room // len(load_E)))
    for load in _most_uneven(load_E, room):
        if load == 0:
            line.append(glyphs.dead * columns, style="bold red")
        else:
            octaves = float(np.log2(load))
            bar = BALANCED + round(BARS_PER_OCTAVE * octaves)
            bar = min(max(bar, 0), len(glyphs.bars) - 1)
            line.append(glyphs.bars[bar] * columns, style=_color(octaves))
    line.append(f"{violation:>{width - len(line)}.2f}")
    return line


def _most_uneven(load_E: np.ndarray, room: int) -> np.ndarray:
    """Keep at most ``room`` loads: of each group of neighbours, the one furthest from balance."""
    neighbours = -(-len(load_E) // room)
    starts = np.arange(0, len(load_E), neighbours)
    distance_E = np.abs(np.log2(np.maximum(load_E, 2.0**-20)))
    return np.array(
        [load_E[start + distance_E[start : start + neighbours].argmax()] for start in starts]
    )


def _color(octaves: float) -> str:
    """Return a colour: blue below balance, green at balance, orange above."""
    red, green, blue = (round(float(np.interp(octaves, _OCTAVES, channel))) for channel in _RGB)
    return f"rgb({red},{green},{blue})"


def _scale(num_shown: int, follower: Follower, width: int, glyphs: Glyphs) -> Text:
    num_layers, num_experts = follower.load.counts_ME.shape
    line = Text(" " * _LABEL)
    for bar, glyph in enumerate(glyphs.bars):
        octaves = (bar - BALANCED) / BARS_PER_OCTAVE
        line.append(glyph, style=_color(octaves)).append(f" {2**octaves:.2g}  ")
    line.append(glyphs.dead, style="bold red").append(" none")
    neighbours = -(-num_experts // max(1, width - _LABEL - _MAX_VIOLATION))
    if neighbours > 1:
        line.append(
            f"\n{'':{_LABEL}}a column is {neighbours} experts, the one furthest from balance"
        )
    if num_shown < num_layers:
        line.append(f"\n{'':{_LABEL}}the {num_shown} worst of {num_layers} layers")
    return line


def _history(values: dict[int, float], room: int, glyphs: Glyphs) -> str:
    """Draw values by step since the first step as bars, from zero to their maximum."""
    if len(values) < 2 or room < 1:
        return ""
    steps, numbers = np.array(sorted(values)), np.array([values[step] for step in sorted(values)])
    edges = np.linspace(steps[0], steps[-1] + 1, min(room, 40, len(steps)) + 1)
    columns = np.split(numbers, np.searchsorted(steps, edges[1:-1]))
    means = np.array([column.mean() for column in columns if len(column)])
    bars = np.rint(means / max(means.max(), 1e-9) * (len(glyphs.bars) - 1)).astype(int)
    return "".join(glyphs.bars[bar] for bar in bars)
