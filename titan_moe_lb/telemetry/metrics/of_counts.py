"""Metrics that follow from the counts of a layer alone, so that the trace has no column for them."""

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
"""Name to the function of counts ``(M, E)`` that computes it for each layer."""

WITHOUT_PERCENTILES = ("normalized_entropy", "dead_experts")
"""A high entropy is good, so that its high percentiles mean nothing; few layers have dead experts."""
