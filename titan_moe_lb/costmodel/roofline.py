"""The time of matrix products: either the arithmetic or the memory is the limit."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from titan_moe_lb.costmodel.load import Array, ExpertLoad


def gemm_time(
    rows: ArrayLike,
    inner: float,
    columns: float,
    *,
    peak_flops: float,
    memory_bandwidth: float,
    bytes_per_element: float = 2,
) -> Array:
    """Seconds of ``(rows, inner) x (inner, columns)``.

    ``max(FLOPs / peak, bytes / bandwidth)``: the roofline of Williams, Waterman and
    Patterson (CACM 52(4), 2009), each operand moved once.

    Args:
        peak_flops: FLOP/s that the device reaches on large products.
        memory_bandwidth: bytes/s.
    """
    rows = np.asarray(rows, dtype=np.float64)
    arithmetic = 2 * rows * inner * columns / peak_flops
    elements = rows * inner + inner * columns + rows * columns
    memory = bytes_per_element * elements / memory_bandwidth
    return np.where(rows > 0, np.maximum(arithmetic, memory), 0.0)[()]


def expert_forward_time(
    load: ExpertLoad, dim: float, hidden_dim: float, *, peak_flops: float, memory_bandwidth: float
) -> Array:
    """Seconds of the grouped products w1, w3 (D to F) and w2 (F to D) on the busiest device.

    The backward pass takes twice as long: each product has one for the gradient of its
    input and one for that of its weight, of the same size.
    """
    hot, hot_rows, others, other_rows = load.gemms()
    return hot * mlp_time(
        hot_rows, dim, hidden_dim, peak_flops=peak_flops, memory_bandwidth=memory_bandwidth
    ) + others * mlp_time(
        other_rows, dim, hidden_dim, peak_flops=peak_flops, memory_bandwidth=memory_bandwidth
    )


def mlp_time(
    rows: ArrayLike, dim: float, hidden_dim: float, *, peak_flops: float, memory_bandwidth: float
) -> Array:
    """Seconds of the three products of one SwiGLU expert on ``rows`` tokens, forward."""
    into = gemm_time(
        rows, dim, hidden_dim, peak_flops=peak_flops, memory_bandwidth=memory_bandwidth
    )
    back = gemm_time(
        rows, hidden_dim, dim, peak_flops=peak_flops, memory_bandwidth=memory_bandwidth
    )
    return 2 * into + back
