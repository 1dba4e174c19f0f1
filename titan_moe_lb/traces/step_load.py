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
    losses: dict[str, np.ndarray]
    """Metric name to float64 ``(M,)``: raw, unweighted, mean over micro-batches; NaN where
    the layer lacks the loss."""
    avg_overload_factor_M: np.ndarray
    """float64 ``(M,)``: mean over micro-batches and data-parallel slices; at least 1."""
    max_overload_factor_M: np.ndarray
    """float64 ``(M,)``: maximum over the same; at least 1."""
    micro_batch_max_violation_M: np.ndarray
    """float64 ``(M,)``: MaxVio of a micro-batch, mean over micro-batches."""
    max_cum_overload_factor: float
    """One number for the step: the worst rank's peak of tokens kept until backward, relative
    to the balanced peak."""
