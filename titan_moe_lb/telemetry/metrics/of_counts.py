"""Metrics that are functions of a layer's counts, so the trace needs no column for them."""

from __future__ import annotations

from titan_moe_lb.traces.balance_statistics import (
    coefficient_of_variation,
    max_violation,
    normalized_entropy,
    num_dead_experts,
)

OF_COUNTS = {
    "max_violation": max_violation,
    "coefficient_of_variation": coefficient_of_variation,
    "normalized_entropy": normalized_entropy,
    "dead_experts": num_dead_experts,
}
"""Name to a function from counts ``(M, E)`` to the number of each layer."""
