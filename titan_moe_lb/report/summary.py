"""The figures of a run that are read as numbers: cards and the tables of experts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from titan_moe_lb.telemetry.balance_statistics import (
    max_violation,
    num_dead_experts,
    relative_load,
)
from titan_moe_lb.telemetry.trace import Trace

NUM_LISTED = 8
"""Experts in each table."""


@dataclass(frozen=True, slots=True)
class Card:
    """One number with its name, and a line below."""

    label: str
    value: str
    note: str


@dataclass(frozen=True, slots=True)
class Expert:
    """One expert of one layer; loads are relative to the balanced load."""

    layer: int
    expert: int
    mean: str
    last: str
    lowest: str
    highest: str


def cards(trace: Trace) -> list[Card]:
    """The head of the page."""
    steps = trace.steps
    violation_SM = max_violation(trace.counts_SME)
    violation_S = violation_SM.mean(axis=1)
    worst = int(violation_SM[-1].argmax())
    dead_S = num_dead_experts(trace.counts_SME).sum(axis=1)
    hottest = hottest_experts(trace)[0]
    average_S = trace.avg_overload_factor_SM.mean(axis=1)
    peak_S = trace.max_overload_factor_SM.max(axis=1)
    return [
        Card(
            "MaxVio, first → last",
            f"{number(violation_S[0])} → {number(violation_S[-1])}",
            f"worst layer now: {trace.layers[worst]} with {number(violation_SM[-1, worst])}",
        ),
        Card(
            "Overload, mean",
            number(average_S[-1]),
            f"last step; {number(average_S[0])} at first",
        ),
        Card(
            "Overload, maximum",
            number(peak_S[-1]),
            f"last step; {_peak(peak_S, steps)}",
        ),
        Card(
            "Overload, cumulative",
            number(trace.max_cum_overload_factor_S[-1]),
            f"last step; {_peak(trace.max_cum_overload_factor_S, steps)}",
        ),
        Card(
            "Dead experts",
            f"{dead_S[-1]} of {len(trace.layers) * trace.info.num_experts}",
            f"last step; most: {dead_S.max()} at step {steps[dead_S.argmax()]}"
            if dead_S.any()
            else "none in the whole run",
        ),
        Card(
            "Hottest expert",
            f"layer {hottest.layer}, expert {hottest.expert}",
            f"{hottest.mean} × the balanced load, mean of the run",
        ),
    ]


def hottest_experts(trace: Trace) -> list[Expert]:
    """The experts with the highest mean load over the run, hottest first."""
    return _experts(trace, hottest=True)


def coldest_experts(trace: Trace) -> list[Expert]:
    """The experts with the lowest mean load over the run, coldest first."""
    return _experts(trace, hottest=False)


def _experts(trace: Trace, hottest: bool) -> list[Expert]:
    load_SME = relative_load(trace.counts_SME)
    mean_ME = load_SME.mean(axis=0)
    order = np.argsort(-mean_ME if hottest else mean_ME, axis=None, kind="stable")
    listed = []
    for row, expert in zip(*np.unravel_index(order[:NUM_LISTED], mean_ME.shape), strict=True):
        load_S = load_SME[:, row, expert]
        listed.append(
            Expert(
                layer=trace.layers[row],
                expert=int(expert),
                mean=number(load_S.mean()),
                last=number(load_S[-1]),
                lowest=number(load_S.min()),
                highest=number(load_S.max()),
            )
        )
    return listed


def number(value: float) -> str:
    """Three digits that matter; a dash for a figure that is missing."""
    if not np.isfinite(value):
        return "–"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 2 - int(np.floor(np.log10(max(abs(value), 0.1)))))}f}"


def _peak(values_S: np.ndarray, steps: np.ndarray) -> str:
    if np.isnan(values_S).all():
        return "not recorded"
    peak = int(np.nanargmax(values_S))
    return f"peak {number(values_S[peak])} at step {steps[peak]}"
