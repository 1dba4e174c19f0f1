"""Check of the parts that the job froze."""

from __future__ import annotations

import numpy as np

from titan_moe_lb.commands.diagnose.finding import Finding, Severity
from titan_moe_lb.commands.diagnose.window import Window

COLUMNS = {"gate": "frozen_gate_squared", "bias": "bias_norm"}
"""Part to the column that changes only if the part does."""
EQUAL = 1e-6
"""Relative change of a norm that a resume under another layout may cause by rounding."""


def frozen_part_drifts(window: Window) -> Finding | str | None:
    """Check if a frozen gate or bias changes."""
    frozen = window.trace.info.frozen
    seen, drifting = [], []
    drifts_M = np.zeros(len(window.trace.layers), dtype=bool)
    for part, name in COLUMNS.items():
        column_SM = window.column(name)
        frozen_M = np.isin(window.trace.layers, frozen.get(part, []))
        if column_SM is None or column_SM.ndim < 2 or not frozen_M.any():
            continue
        norm_SM = np.ma.masked_invalid(column_SM[:, frozen_M])
        change = (norm_SM.max(0) - norm_SM.min(0)) / np.maximum(abs(norm_SM).max(0), 1e-30)
        change_M = np.zeros(len(frozen_M))
        change_M[frozen_M] = np.ma.filled(change, 0.0)
        seen.append(f"{name} of the frozen {part} changes by {change_M.max():.2g}")
        if change_M.max() > EQUAL:
            drifting.append(part)
            drifts_M |= change_M > EQUAL
    if not drifting:
        return "; ".join(seen) or None
    return Finding(
        severity=Severity.FAULT,
        what=f"the frozen {' and '.join(drifting)} of {window.layers(drifts_M)} changes",
        evidence="; ".join(seen)
        + f", relative to it, in the last {len(window.counts_SME)} logged steps",
        reason="nothing of a frozen part may change: other code writes to it, such as a second hook "
        "before the optimizer, or requires_grad_() after the freezing",
        remedy="remove what writes to it, or leave it out of [model] freeze",
        layers=window.numbers(drifts_M),
    )
