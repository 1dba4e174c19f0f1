"""Checks of the run as a whole: divergence, forced routing, padding."""

from __future__ import annotations

import numpy as np

from titan_moe_lb.commands.diagnose.finding import Finding, Severity
from titan_moe_lb.commands.diagnose.window import Window

MUCH_PADDING = 0.3


def diverged(window: Window) -> Finding | str | None:
    """Check if the language-model loss is no longer finite."""
    loss_S = window.trace.step_columns.get("loss")
    if loss_S is None or np.isnan(loss_S).all():  # the trace may not have recorded it
        return None
    bad_S = ~np.isfinite(loss_S)
    if not bad_S[-1]:
        return f"loss {loss_S[-1]:.4g}"
    known = np.flatnonzero(~bad_S)
    first = int(window.trace.steps[known[-1] + 1 if len(known) else 0])
    last = f"{loss_S[known[-1]]:.4g}" if len(known) else "none"
    return Finding(
        severity=Severity.FAULT,
        what=f"the language-model loss is not a number from step {first} on",
        evidence=f"the last finite loss is {last}",
        reason="no step after it teaches the model anything: gradients are not finite either",
        remedy="go on from a checkpoint before it with a lower learning rate",
        since=first,
    )


def forced_routing(window: Window) -> Finding | None:
    """Check if the routing was forced by a benchmark strategy."""
    forced = window.trace.info.forced_routing
    if forced is None:
        return None
    return Finding(
        severity=Severity.NOTE,
        what=f"{forced} decided where tokens went",
        evidence="forced_routing in the metadata of the trace",
        reason="a benchmark shows what an imbalance costs, not how a router behaves",
        remedy="remove forced_routing from the job to train",
    )


def padding(window: Window) -> Finding | str | None:
    """Check if much of the routed tokens is padding."""
    share_S = window.column("padding_share")
    if share_S is None:
        return None
    what = f"{np.nanmean(share_S):.0%} of the routed tokens are padding"
    if np.nanmean(share_S) <= MUCH_PADDING:
        return what
    return Finding(
        severity=Severity.NOTE,
        what=what,
        evidence="moe/padding_share, mean over the last steps",
        reason=f"padding is dispatched like any token: above {MUCH_PADDING:.0%} it weighs on load and time",
        remedy="pack rows, or make them shorter",
    )
