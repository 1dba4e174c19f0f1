"""Columns of an outcome, which several tables share."""

from __future__ import annotations

from titan_moe_lb.commands.answer.answer import Column, Row
from titan_moe_lb.commands.answer.words import decimals, memory, number
from titan_moe_lb.costmodel.times.outcome import Outcome

MEANING = (
    "Times in ms: one micro-batch's forward of one MoE layer on the busiest rank; combine takes as long "
    "as dispatch. x balance: relative to balance at the same EP. Overload: tokens of the busiest rank "
    "over those at balance, as mean and as maximum over layers and micro-batches; peak expert: the "
    "maximum of an expert. ! does not fit. All columns: docs/howto/plan_a_job.md."
)

COLUMNS = (
    Column(title="compute", unit="ms", show=number),
    Column(title="dispatch", unit="ms", show=number),
    Column(title="combine", unit="ms", show=number, on_terminal=None),
    Column(title="layer x balance", show=decimals(2)),
    Column(title="step", unit="s", show=number),
    Column(title="step x balance", show=decimals(2)),
    Column(title="mean overload", show=decimals(2)),
    Column(title="peak overload", show=decimals(2)),
    Column(title="peak expert", show=decimals(2)),
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
        outcome.mean_overload,
        outcome.peak_overload,
        outcome.peak_expert_load,
        memory(outcome.memory_bytes, outcome.fits),
    )
