"""Facts, cards and tables of a report."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from titan_moe_lb.commands.answer import words
from titan_moe_lb.commands.diagnose.finding import Finding
from titan_moe_lb.pages.cards import Card
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
NUM_PLACES = 3
"""Layers or experts that a card or a finding names."""


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
    """Make the cards at the top of the page: values of the last step, and their places.

    A value that the run has not recorded, or that cannot differ, has no card.

    Args:
        trace: trace of the run.
        hottest: expert with the highest mean load over the run.
    """
    steps, step = trace.steps, "step that was read" if trace.is_sample else "logged step"
    now = hottest_now(trace)
    violation_M = max_violation(trace.counts_SME[-1])
    worst = int(violation_M.argmax())
    dead_SM = num_dead_experts(trace.counts_SME)
    dead_S = dead_SM.sum(axis=1)
    average_S = trace.over_steps("avg_overload_factor")
    peak_S = trace.over_steps("max_overload_factor")
    cumulative_S = trace.over_steps("max_cum_overload_factor")
    slot_S = trace.over_steps("activation_slot_factor")
    loss_S, pace, seconds = (
        trace.over_steps("loss"),
        trace.over_steps("tokens_per_second")[-1],
        trace.over_steps("step_seconds")[-1],
    )
    made = []
    if np.isfinite(loss_S).any():
        last = int(np.flatnonzero(np.isfinite(loss_S))[-1])
        note = f"step {steps[last]}"
        if last < len(loss_S) - 1:
            note += f", none or not a number since, up to step {steps[-1]}"
        if np.isfinite(pace):
            note += f"; {number(pace)} tokens/s per device, {number(seconds)} s per step"
        made.append(Card("Loss", number(loss_S[last]), note))
    made += [
        Card(
            "MaxVio",
            number(violation_M.mean()),
            f"mean over the layers; worst: layer {trace.layers[worst]} with "
            f"{number(violation_M[worst])}",
        ),
        Card(
            "Hottest expert",
            f"{now.last} ×",
            f"layer {now.layer}, expert {now.expert}; mean of the run: layer {hottest.layer}, "
            f"expert {hottest.expert} with {hottest.mean} ×",
        ),
        Card(
            "Dead experts",
            f"{dead_S[-1]} of {trace.info.num_experts_M.sum()}",
            f"{_of_layers(trace, dead_SM[-1])}most: {dead_S.max()} at step {steps[dead_S.argmax()]}"
            if dead_S.any()
            else f"none in any {step}",
        ),
    ]
    if trace.info.ep == 1 or not np.isfinite(peak_S).any():
        return made
    made.append(
        Card(
            "Most loaded rank",
            f"{number(peak_S[-1])} ×",
            f"overload, the largest of all layers; their mean {number(average_S[-1])}; "
            f"{_peak(peak_S, steps)}",
        )
    )
    if np.isfinite(cumulative_S).any() and not np.array_equal(cumulative_S, average_S):
        made.append(
            Card("Cumulative overload", f"{number(cumulative_S[-1])} ×", _peak(cumulative_S, steps))
        )
    capacities = {"scratch": peak_S, "slot": slot_S}
    known = {name: one_S for name, one_S in capacities.items() if np.isfinite(one_S).any()}
    none, few = (
        " / ".join(number(exceeded_by(one_S, share)) for one_S in known.values())
        for share in (0, 0.01)
    )
    made.append(
        Card(
            f"DistMoE {' / '.join(known)}",
            none,
            f"factors that no {step} overran; at most 1 % of them overran {few}",
        )
    )
    return made


def _of_layers(trace: Trace, dead_M: np.ndarray) -> str:
    """Describe the layers with dead experts, the one with the most first; empty without any."""
    order = np.argsort(-dead_M, kind="stable")[:NUM_PLACES]
    named = [f"{dead_M[row]} in layer {trace.layers[row]}" for row in order if dead_M[row]]
    more = ", ..." if (dead_M > 0).sum() > NUM_PLACES else ""
    return f"{', '.join(named)}{more}; " if named else ""


def places(trace: Trace, finding: Finding) -> list[tuple[int, int]]:
    """Return layers and experts to look at for a finding: its own, or the hottest of its layers."""
    if finding.experts:
        return list(finding.experts[:NUM_PLACES])
    rows = [trace.layers.index(layer) for layer in (finding.layers or ())[:NUM_PLACES]]
    load_ME = relative_load(trace.counts_SME[-1])
    return [(trace.layers[row], int(np.nanargmax(load_ME[row]))) for row in rows]


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
    peak = int(np.nanargmax(values_S))
    return f"peak {number(values_S[peak])} at step {steps[peak]}"
