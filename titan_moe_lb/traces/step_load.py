"""Load of a whole model over one global batch."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLoad:
    """Load and other numbers of all M MoE layers over one global batch, equal on every rank."""

    layers: tuple[int, ...]
    """Layer numbers in the whole model, ascending."""
    counts_ME: np.ndarray
    """Tokens routed to each expert, int64 ``(M, E)``; a row sums to top_k x tokens.

    An absent expert has :data:`~titan_moe_lb.traces.balance_statistics.ABSENT`."""
    micro_batch_counts_ME: np.ndarray | None = None
    """Tokens routed to each expert in one micro-batch, int64 ``(M, E)``: the first one of the first
    expert-parallel group."""
    layer_columns: dict[str, np.ndarray] = field(default_factory=dict)
    """Name of a :class:`Column` to float64 ``(M,)``, NaN for a layer without the number."""
    step_columns: dict[str, float] = field(default_factory=dict)
    """Name of a :class:`Column` to the number of the step."""
