"""Load of a whole model over one global batch."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLoad:
    """All M MoE layers of a model over one global batch, the same on every rank."""

    layers: tuple[int, ...]
    """Layer numbers in the whole model, ascending."""
    counts_ME: np.ndarray
    """Tokens routed to each expert, int64 ``(M, E)``: a row sums to top_k x the tokens.
    :data:`~titan_moe_lb.traces.balance_statistics.ABSENT` where a layer has fewer than E."""
    micro_batch_counts_ME: np.ndarray | None = None
    """Tokens that one micro-batch of one expert-parallel group routed to each expert, int64
    ``(M, E)``: the step's first of the first group, the same in every layer."""
    layer_columns: dict[str, np.ndarray] = field(default_factory=dict)
    """Name of a :class:`Column` to float64 ``(M,)``, NaN where a layer lacks it."""
    step_columns: dict[str, float] = field(default_factory=dict)
    """Name of a :class:`Column` to the one number of the step."""
