"""Checks of expert loads: collapse, dead experts, hot experts, an uneven first layer."""

from __future__ import annotations

import numpy as np

from titan_moe_lb.commands.diagnose.balancing import Balancing
from titan_moe_lb.commands.diagnose.checks.ranks import LATE
from titan_moe_lb.commands.diagnose.finding import Finding, Severity
from titan_moe_lb.commands.diagnose.window import Window, effective_experts
from titan_moe_lb.traces.balance_statistics import relative_load
from titan_moe_lb.traces.expert_order import contiguous, overload


def collapse(window: Window) -> Finding | str | None:
    """Check if the entropy of the load is as low as for few experts."""
    effective_M = effective_experts(window.counts_SME).mean(axis=0)
    chance_M = window.by_chance(effective_experts, window.tokens_per_step)
    collapsed_M = effective_M < chance_M / 2
    worst = int((effective_M / chance_M).argmin())
    seen = (
        f"the load of layer {window.trace.layers[worst]} is as concentrated as on "
        f"{effective_M[worst]:.1f} balanced experts, MaxVio {window.violation_M[worst]:.2f}; "
        f"balance up to chance is {chance_M[worst]:.1f}"
    )
    if not collapsed_M.any():
        return seen
    course_S = effective_experts(window.trace.counts_SME[:, worst])
    since = window.since((chance_M[worst] + effective_M[worst]) / 2 - course_S)
    begin = f"go on from a checkpoint before step {since}, or start again: "
    if since == window.trace.steps[0]:
        begin = "start again: "
    return Finding(
        severity=Severity.FAULT,
        what=f"routing collapses in {window.layers(collapsed_M)}",
        evidence=seen,
        reason="below half of that, other experts hardly learn and fall further behind",
        **Balancing(window).harder(begin),
        layers=window.numbers(collapsed_M),
        since=since,
    )


def dead_experts(window: Window) -> Finding | str | None:
    """Check for experts without a token in the whole window, beyond sampling noise."""
    dead_ME = (window.load_ME == 0) & window.beyond_chance(window.load_ME)
    seen = f"balance is {window.balanced_M.min():.0f} tokens each in the last {len(window.counts_SME)} steps"
    if not dead_ME.any():
        return f"{int((window.load_ME == 0).sum())} experts without a token; {seen}"
    experts, dead_M = window.experts(dead_ME), dead_ME.any(axis=1)
    share = dead_ME.sum() / window.trace.info.num_experts_M.sum()
    row = int(np.flatnonzero(dead_M)[0])
    load_S = relative_load(window.trace.counts_SME[:, row])[:, experts[0][1]]
    return Finding(
        severity=Severity.FAULT if share > 0.05 else Severity.WARNING,
        what=f"{len(experts)} of {window.trace.info.num_experts_M.sum()} experts got no token at "
        f"all, in {window.layers(dead_M)}",
        evidence=f"layer {experts[0][0]}: experts {np.flatnonzero(dead_ME[row])[:6].tolist()}; {seen}",
        reason="an expert without tokens has no gradient, and does not come back by itself",
        **Balancing(window).harder(),
        layers=window.numbers(dead_M),
        experts=experts,
        since=window.since(0.5 - load_S),
    )


def hot_expert(window: Window) -> Finding | str | None:
    """Check for experts with far more than their share over the whole window."""
    load_ME, most_M1 = window.load_ME, 1 + window.uneven_M[:, None]
    # Dead experts raise the share of all others, which does not make one of them hot.
    num_experts_M1 = window.trace.info.num_experts_M[:, None]
    alive_M1 = (load_ME > 0).sum(axis=1, keepdims=True) / num_experts_M1
    hot_ME = (load_ME * alive_M1 > most_M1) & window.beyond_chance(load_ME)
    row, expert = np.unravel_index(np.nanargmax(load_ME * (hot_ME | ~hot_ME.any())), load_ME.shape)
    load, most = float(load_ME[row, expert]), float(most_M1[row, 0])
    name = f"expert {expert} of layer {window.trace.layers[row]} gets {load:.2f} times its share"
    if not hot_ME.any():
        return f"{name}, bad above {most:.2g}"
    since = window.since(relative_load(window.trace.counts_SME[:, row])[:, expert] - (1 + load) / 2)
    others = f"; {hot_ME.sum() - 1} more in {window.layers(hot_ME.any(axis=1))}"
    evidence, effect = _cost(window, int(row), int(expert))
    return Finding(
        what=f"{name} since step {since}{others if hot_ME.sum() > 1 else ''}",
        evidence=evidence,
        reason=f"above {most:.2g} times, and beyond chance, {effect}",
        **Balancing(window).harder(),
        layers=window.numbers(hot_ME.any(axis=1)),
        experts=window.experts(hot_ME),
        since=since,
    )


def _cost(window: Window, row: int, expert: int) -> tuple[str, str]:
    """Describe the overload of the hottest rank with and without the expert's excess.

    Returns:
        The numbers, and their effect on a step.
    """
    ep, num_experts = window.trace.info.ep, int(window.trace.info.num_experts_M[row])
    learns = "it learns from far more tokens than the others"
    if ep == 1 or num_experts % ep:
        return (
            "without expert parallelism no rank waits for it; its own products take longer",
            learns,
        )
    load_E, placed = window.load_ME[row, :num_experts], contiguous(num_experts, ep)
    load_R = load_E[placed].mean(axis=-1)
    own, hottest = expert // placed.shape[1], int(load_R.argmax())
    evidence = (
        f"at expert-parallel degree {ep} its rank {own} gets {load_R[own]:.2f} times its share"
    )
    if own != hottest:
        evidence += f"; the hottest rank of the layer is {hottest}, with {load_R[hottest]:.2f}"
        return evidence, f"{learns}; another rank decides the time of the layer"
    without_E = load_E.copy()
    without_E[expert] = np.delete(load_E, expert).mean()
    evidence += f", {overload(without_E, placed):.2f} if the expert were like the others"
    if load_R[own] > LATE:
        return evidence, "other ranks wait for it"
    return evidence, f"{learns}; the ranks of the layer are even to {LATE}, so a step hardly waits"


def first_layers(window: Window) -> Finding | str | None:
    """Check if the first MoE layer is far less balanced than the others."""
    if len(window.violation_M) < 4:
        return None
    first, others = float(window.violation_M[0]), float(np.median(window.violation_M[1:]))
    seen = f"MaxVio {first:.2f} against {others:.2f}, the median of the other layers"
    if first < window.uneven_M[0] / 2 or first < 2 * others:
        return seen
    return Finding(
        severity=Severity.NOTE,
        what=f"the first MoE layer ({window.trace.layers[0]}) is far less balanced than the others",
        evidence=seen,
        reason="the first layer sees little but the token itself, and few tokens are frequent; "
        "above twice the others it decides the time of a step",
        **Balancing(window).harder("leave first layers dense, as DeepSeek-V3 does with three; or "),
        layers=(window.trace.layers[0],),
    )
