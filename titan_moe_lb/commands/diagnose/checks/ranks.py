"""Checks of the loads of expert-parallel ranks, which wait for each other in every micro-batch."""

from __future__ import annotations

import numpy as np

from titan_moe_lb.commands.diagnose.finding import Finding
from titan_moe_lb.commands.diagnose.window import Window
from titan_moe_lb.traces import expert_order
from titan_moe_lb.traces.balance_statistics import max_violation

LATE = 1.2
SEQUENCE_WISE = "seq_load_balancing_loss"


def hot_rank(window: Window) -> Finding | str | None:
    """Check if another order of the same experts would balance the ranks far better."""
    info = window.trace.info
    if info.ep == 1 or (info.num_experts_M % info.ep).any():
        return None
    loads = [load_E[~np.isnan(load_E)] for load_E in window.load_ME]
    as_placed = [expert_order.contiguous(len(load_E), info.ep) for load_E in loads]
    factor_M = np.array(list(map(expert_order.overload, loads, as_placed)))
    best_M = factor_M.copy()
    late_M = (factor_M > LATE) & window.beyond_chance(factor_M, info.num_experts_M // info.ep)
    for row in np.flatnonzero(late_M):
        best = expert_order.greedy_in_groups(loads[row], info.ep, info.expert_groups or ())
        best_M[row] = expert_order.overload(loads[row], best)
    hot_M = best_M < 1 + (factor_M - 1) / 2
    worst = int(np.argmax(np.where(hot_M, factor_M, 0))) if hot_M.any() else int(factor_M.argmax())
    seen = (
        f"layer {window.trace.layers[worst]}: rank "
        f"{int(loads[worst][as_placed[worst]].sum(axis=-1).argmax())} of {info.ep} gets "
        f"{factor_M[worst]:.2f} times its share"
    )
    if not hot_M.any():
        return seen
    return Finding(
        what=f"an expert-parallel rank is hot because of the experts that share it, in "
        f"{window.layers(hot_M)}",
        evidence=f"{seen}; the same experts in another order would give {best_M[worst]:.2f}",
        reason=f"above {LATE} the other ranks wait a fifth of the time of their experts",
        remedy="titan-moe-lb plan --from-run predicts what moving experts saves, titan-moe-lb place "
        "moves them; with a stronger balance neither is needed",
        layers=window.numbers(hot_M),
    )


def hidden_in_micro_batches(window: Window) -> Finding | str | None:
    """Check if single micro-batches are uneven, but their sum is not."""
    single_SM = window.column("micro_batch_max_violation")
    if single_SM is None:
        return None
    info = window.trace.info
    tokens = info.micro_batch_size * info.seq_len * info.ep
    chance_M = window.by_chance(max_violation, tokens)
    single_M = np.nanmean(single_SM, axis=0)
    hidden_M = (single_M > 1.5 * chance_M + 0.5) & (window.violation_M < single_M / 3)
    worst = int(np.argmax(np.where(hidden_M, single_M, 0))) if hidden_M.any() else 0
    seen = (
        f"MaxVio {single_M[worst]:.2f} in a micro-batch, {window.violation_M[worst]:.2f} in a "
        f"step; sampling noise alone gives {chance_M[worst]:.2f} in a micro-batch"
    )
    if not hidden_M.any():
        return seen
    weight = info.losses.get(SEQUENCE_WISE)
    return Finding(
        what=f"single micro-batches are far less balanced than whole steps in "
        f"{window.layers(hidden_M)}",
        evidence=seen,
        reason="ranks wait in every micro-batch, and memory peaks in one, even if the sum is even",
        remedy="a loss over each sequence evens out single micro-batches"
        + (", at ten times its weight" if weight else ""),
        toml=f"weight = {10 * weight:g}   # of {SEQUENCE_WISE}"
        if weight
        else 'aux_losses = [{type = "sequence_wise", weight = 1e-3}]',
        layers=window.numbers(hidden_M),
    )
