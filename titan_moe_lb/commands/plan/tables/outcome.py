"""Columns of an outcome, which several tables share."""

from __future__ import annotations

from titan_moe_lb.commands.answer.answer import Column, Row
from titan_moe_lb.commands.answer.words import decimals, memory, number
from titan_moe_lb.costmodel.times.outcome import Outcome

COLUMNS = (
    Column(title="compute", unit="ms", show=number),
    Column(title="dispatch", unit="ms", show=number),
    Column(title="combine", unit="ms", show=number),
    Column(title="layer x balance", show=decimals(2)),
    Column(title="step", unit="s", show=number),
    Column(title="step x balance", show=decimals(2)),
    Column(title="hot expert", unit="tokens", show=decimals(0)),
    Column(title="busiest rank", unit="tokens", show=decimals(0)),
    Column(title="memory", unit="GiB", show=number),
)


def row(outcome: Outcome) -> Row:
    """Values of :data:`COLUMNS`."""
    return (
        outcome.compute_seconds * 1e3,
        outcome.dispatch_seconds * 1e3,
        outcome.combine_seconds * 1e3,
        outcome.layer_slowdown,
        outcome.step_seconds,
        outcome.step_slowdown,
        outcome.hot_expert_tokens,
        outcome.busiest_rank_tokens,
        memory(outcome.memory_bytes, outcome.fits),
    )
