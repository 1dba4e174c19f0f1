"""The charts of a deployment's page, as plotly figures."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import plotly.graph_objects as go

from titan_moe_lb.commands.plan.sentences import GIB
from titan_moe_lb.commands.plan.serving.answer import Serving
from titan_moe_lb.costmodel.times.serving import ServedRow, ServedStep
from titan_moe_lb.pages.charts import PENS, Chart, Panel, Pen, add_curve, blank_figure, label_curves
from titan_moe_lb.pages.palette import ramp


def charts(answer: Serving) -> list[Chart]:
    """Time, throughput and memory against the tokens of a step, under the load that is judged."""
    return [
        Chart(
            "Decode",
            f"One token of each sequence of {answer.context:,}, under the load {answer.judged.name}: how "
            "long a step takes, and how many tokens a device makes in a second.",
            _time_and_speed(answer, lambda row: row.decode),
        ),
        Chart(
            "Prefill",
            "So many tokens of prompts of that length in one step.",
            _time_and_speed(answer, lambda row: row.prefill),
        ),
        Chart(
            "Memory",
            "Weights, and the caches of as many sequences as tokens. Usable: "
            f"{answer.usable_bytes / GIB:.1f} GiB.",
            [Panel("", _curves(answer, lambda row: row.decode.memory_bytes / GIB, "GiB"))],
        ),
    ]


def _time_and_speed(answer: Serving, of: Callable[[ServedRow], ServedStep]) -> list[Panel]:
    seconds = _curves(answer, lambda row: of(row).step_seconds * 1e3, "ms")
    speed = _curves(answer, lambda row: of(row).tokens_per_second, "tokens/s")
    return [Panel("a step", seconds), Panel("tokens a second", speed)]


def _curves(answer: Serving, value: Callable[[ServedRow], float], title: str) -> go.Figure:
    figure = blank_figure(title, "tokens of a device in a step")
    for index, degree in enumerate(answer.degrees):
        rows = sorted(
            (row for row in degree.rows if row.load == answer.judged.name),
            key=lambda row: row.tokens,
        )
        pen = Pen(ramp(index, len(answer.degrees)), PENS[index % len(PENS)].dash)
        x = np.array([row.tokens for row in rows])
        add_curve(figure, f"EP {degree.ep_degree}", x, np.array([*map(value, rows)]), pen)
    figure.update_xaxes(type="log", tickvals=sorted({row.tokens for row in answer.degrees[0].rows}))
    label_curves(figure)
    return figure
