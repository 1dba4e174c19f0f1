"""Facts, cards and tables of a report."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from titan_moe_lb.commands.answer import words
from titan_moe_lb.traces.balance_statistics import (
    ABSENT,
    extreme_experts,
    max_violation,
    num_dead_experts,
    relative_load,
)
from titan_moe_lb.traces.capacity import exceeded_by
from titan_moe_lb.traces.trace import Trace

NUM_LISTED = 8
"""Experts in each table."""


@dataclass(frozen=True, slots=True)
class Card:
    """Number with its label and a note."""

    label: str
    value: str
    note: str


@dataclass(frozen=True, slots=True)
class Expert:
    """Row of a table: one expert of one layer, with loads relative to the balanced load."""

    layer: int
    expert: int
    mean: str
    last: str
    lowest: str
    highest: str


def facts(trace: Trace) -> dict[str, str]:
    """Describe layout, steps, batch and balancing of the run, by name."""
    info, steps = trace.info, trace.steps
    resumed = f", resumed at {', '.join(map(str, info.resumed_at))}" if info.resumed_at else ""
    logged = f"{len(steps)} logged"
    if trace.is_sample:
        logged = f"{len(steps)} evenly spread ones of those logged"
    losses = ", ".join(
        f"{name.replace('_', ' ')} × {weight}" for name, weight in info.losses.items()
    )
    balancing = {"Aux losses": losses or "none", "Expert bias": info.expert_bias or "off"}
    if info.is_foreign:
        balancing = {"Balancing": "not known, the run is of another framework"}
    return {
        "Layout": info.layout,
        "Steps": f"{steps[0]} to {steps[-1]}, {logged}{resumed}",
        "Batch": f"{info.global_batch_size} sequences of {info.seq_len} tokens",
        **balancing,
    }


def cards(trace: Trace, hottest: Expert) -> list[Card]:
    """Make the cards at the top of the page.

    Args:
        trace: trace of the run.
        hottest: expert with the highest mean load over the run.
    """
    steps, step = trace.steps, "step that was read" if trace.is_sample else "logged step"
    now = hottest_now(trace)
    violation_SM = max_violation(trace.counts_SME)
    violation_S = violation_SM.mean(axis=1)
    worst = int(violation_SM[-1].argmax())
    dead_S = num_dead_experts(trace.counts_SME).sum(axis=1)
    average_S = trace.over_steps("avg_overload_factor")
    peak_S = trace.over_steps("max_overload_factor")
    cumulative_S = trace.over_steps("max_cum_overload_factor")
    slot_S = trace.over_steps("activation_slot_factor")
    loss_S = trace.over_steps("loss")
    return [
        Card(
            "Loss, first → last",
            f"{number(loss_S[0])} → {number(loss_S[-1])}",
            f"{number(trace.over_steps('tokens_per_second')[-1])} tokens/s per device, "
            f"{number(trace.over_steps('step_seconds')[-1])} s per step"
            if np.isfinite(loss_S).any()
            else "not recorded",
        ),
        Card(
            "MaxVio, first → last",
            f"{number(violation_S[0])} → {number(violation_S[-1])}",
            f"worst layer now: {trace.layers[worst]} with {number(violation_SM[-1, worst])}",
        ),
        Card(
            "Overload, mean / max",
            f"{number(average_S[-1])} / {number(peak_S[-1])}",
            f"last step; {_peak(peak_S, steps)}",
        ),
        Card(
            "Overload, cumulative",
            number(cumulative_S[-1]),
            f"last step; {_peak(cumulative_S, steps)}",
        ),
        Card(
            "Dead experts",
            f"{dead_S[-1]} of {trace.info.num_experts_M.sum()}",
            f"last step; most: {dead_S.max()} at step {steps[dead_S.argmax()]}"
            if dead_S.any()
            else f"none in any {step}",
        ),
        Card(
            "Hottest expert",
            f"layer {now.layer}, expert {now.expert}",
            f"{now.last} × the balanced load, last step; mean of the run: layer {hottest.layer}, "
            f"expert {hottest.expert} with {hottest.mean} ×",
        ),
        Card(
            "DistMoE scratch / slot",
            f"{number(exceeded_by(peak_S, 0))} / {number(exceeded_by(slot_S, 0))}",
            f"factors that no {step} overran; at most 1 % of them overran "
            f"{number(exceeded_by(peak_S, 0.01))} / {number(exceeded_by(slot_S, 0.01))}",
        ),
    ]


def hottest_and_coldest(trace: Trace) -> tuple[list[Expert], list[Expert]]:
    """Find the experts with the highest and with the lowest mean load over the run."""
    mean_ME = _mean_load(trace)
    hottest, coldest = extreme_experts(mean_ME, NUM_LISTED)
    return _experts(trace, mean_ME, hottest), _experts(trace, mean_ME, coldest)


def hottest_now(trace: Trace) -> Expert:
    """Find the expert with the highest load in the last step."""
    hottest = np.nanargmax(relative_load(trace.counts_SME[-1]))
    place = divmod(int(hottest), trace.info.num_experts)
    (expert,) = _experts(trace, _mean_load(trace), [place])
    return expert


def _mean_load(trace: Trace) -> np.ndarray:
    """Compute the mean relative load over the steps ``(M, E)``, without a copy of all counts."""
    num_experts_M = trace.info.num_experts_M
    absent_M = trace.info.num_experts - num_experts_M
    routed_SM = trace.counts_SME.sum(axis=2, dtype=np.float64) - ABSENT * absent_M
    idle_SM = routed_SM == 0
    scale_SM = np.where(idle_SM, 0.0, num_experts_M / np.where(idle_SM, 1.0, routed_SM))
    total_ME = np.einsum("sme,sm->me", trace.counts_SME, scale_SM)
    mean_ME = (total_ME + idle_SM.sum(axis=0)[:, None]) / len(trace.steps)
    return np.where(trace.counts_SME[0] >= 0, mean_ME, np.nan)


def _experts(trace: Trace, mean_ME: np.ndarray, places: list[tuple[int, int]]) -> list[Expert]:
    experts = []
    for row, expert in places:
        load_S = relative_load(trace.counts_SME[:, row])[:, expert]
        experts.append(
            Expert(
                layer=trace.layers[row],
                expert=expert,
                mean=number(mean_ME[row, expert]),
                last=number(load_S[-1]),
                lowest=number(load_S.min()),
                highest=number(load_S.max()),
            )
        )
    return experts


def number(value: float) -> str:
    """Format a number with three significant digits, or as a dash if it is missing."""
    return words.number(value) if np.isfinite(value) else "–"


def _peak(values_S: np.ndarray, steps: np.ndarray) -> str:
    if np.isnan(values_S).all():
        return "not recorded"
    peak = int(np.nanargmax(values_S))
    return f"peak {number(values_S[peak])} at step {steps[peak]}"
