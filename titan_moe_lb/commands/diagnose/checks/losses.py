"""Checks of the balancing: missing, or too weak."""

from __future__ import annotations

from titan_moe_lb.commands.diagnose.balancing import OTHER_LOSSES, QUANTILE, Balancing
from titan_moe_lb.commands.diagnose.finding import Finding
from titan_moe_lb.commands.diagnose.window import FEWEST_STEPS, Window
from titan_moe_lb.traces.balance_statistics import max_violation


def nothing_balances(window: Window) -> Finding | str | None:
    """Check if the job has neither a balancing loss nor a moving bias."""
    balancing = Balancing(window)
    if window.trace.info.is_foreign:
        return "balancing not known: the run is of another framework"
    if balancing.losses or balancing.bias_moves:
        bias = [balancing.description] * balancing.bias_moves
        return f"balanced by {', '.join([*balancing.losses, *bias])}"
    losses = window.trace.info.losses
    there = [f"{name} {OTHER_LOSSES[name]}" for name in losses]
    there += [f"the bias stands still ({balancing.description})"] * bool(balancing.rule)
    return Finding(
        what="neither an aux loss nor a moving expert bias balances the experts of this run",
        evidence="; ".join([f"MaxVio {window.violation_M.mean():.2f}, mean over layers", *there]),
        reason="without balancing, routers prefer the experts that are ahead",
        remedy="add the sign bias of DeepSeek-V3, or the quantile bias",
        toml=QUANTILE,
    )


def too_weak(window: Window) -> Finding | str | None:
    """Check if the load of most layers is bad, and no better than in the middle of the run."""
    trace, balancing = window.trace, Balancing(window)
    begin, end = trace.balanced_since, len(trace.steps)
    if not (balancing.losses or balancing.bias_moves) or end - begin < 4 * FEWEST_STEPS:
        return None
    before_M = max_violation(trace.counts_SME[(begin + end) // 2 : window.first]).mean(axis=0)
    now_M = window.violation_M
    weak_M, bad = window.lasts(window.uneven_M), window.uneven_M.max()
    weak_M &= now_M >= 0.9 * before_M
    course = f"MaxVio {before_M.mean():.2f} in the middle of the run, {now_M.mean():.2f} at its end"
    if weak_M.mean() <= 0.5:
        return f"{course}; bad above {bad:.2g} in most layers"
    return Finding(
        what=f"the balance is bad and no longer gets better in {window.layers(weak_M)}",
        evidence=course,
        reason=f"above {bad:.2g} other ranks wait for the most loaded expert",
        **balancing.harder(),
        layers=window.numbers(weak_M),
    )
