"""The load of a whole model over one global batch. Imports numpy alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLoad:
    """All M MoE layers of a model over one global batch, the same on every rank."""

    layers: tuple[int, ...]
    """Layer numbers in the whole model, ascending."""
    counts_ME: np.ndarray
    """Tokens routed to each expert, int64 ``(M, E)``: a row sums to top_k x the tokens."""
    figures: dict[str, np.ndarray]
    """Name to float64 ``(M,)``: the aux losses (raw, unweighted) and every metric of a layer;
    NaN where the layer lacks it."""
    step_figures: dict[str, float]
    """Name to the numbers that belong to the step and not to a layer."""
