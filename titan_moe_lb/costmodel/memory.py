"""Bytes that a rank keeps of an MoE layer for the backward pass.

What a rank receives grows with the imbalance; what it sends does not.
"""

from __future__ import annotations

from collections.abc import Callable

from titan_moe_lb.costmodel.layer import BF16_BYTES, MoELayer


def bytes_per_received_token(layer: MoELayer, expert_shards: int = 1) -> float:
    """Kept by the experts for each token and expert: one D and four F wide values.

    The input of w1 and w3, their two results, the activation of the first, and the
    product, which is the input of w2; in BF16, as torchtitan computes them.
    """
    return BF16_BYTES * (layer.dim + 4 * layer.hidden_dim / expert_shards)


def bytes_per_sent_token(layer: MoELayer) -> float:
    """Kept by the combine for each token and expert: the result in float32, for the scores."""
    return 4.0 * layer.dim


def working_bytes_per_received_token(layer: MoELayer) -> float:
    """Not kept, but there while the experts run: the received order and their output."""
    return 2.0 * BF16_BYTES * layer.dim


def largest_that_fits(fits: Callable[[float], bool], worst: float) -> float | None:
    """The largest imbalance in [1, worst] that fits, to a thousandth; None if balance does not.

    Args:
        fits: does not turn true again once it is false.
    """
    if not fits(1.0):
        return None
    if fits(worst):
        return worst
    low, high = 1.0, worst
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
