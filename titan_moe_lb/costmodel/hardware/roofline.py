"""The time of matrix products: either the arithmetic or the memory is the limit."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from titan_moe_lb.costmodel.hardware.device import Hardware
from titan_moe_lb.costmodel.loads.expert_load import Array, ExpertLoad

BF16_BYTES = 2
FP32_BYTES = 4


def gemm_time(rows: ArrayLike, inner: float, columns: float, hardware: Hardware) -> Array:
    """Seconds of ``(rows, inner) x (inner, columns)`` in BF16.

    ``max(FLOPs / peak, bytes / bandwidth)``: the roofline of Williams, Waterman and
    Patterson (CACM 52(4), 2009), each operand moved once.
    """
    rows = np.asarray(rows, dtype=np.float64)
    arithmetic = 2 * rows * inner * columns / hardware.bf16_flops
    elements = rows * inner + inner * columns + rows * columns
    memory = BF16_BYTES * elements / hardware.memory_bandwidth
    return np.where(rows > 0, np.maximum(arithmetic, memory), 0.0)[()]


def turning_rows(inner: float, columns: float, hardware: Hardware) -> float | None:
    """Rows from which on the arithmetic of a product takes longer than moving its operands.

    None where a product of these sizes is always limited by memory.
    """
    # 2 r I C / F = 2 (r I + I C + r C) / M, divided by 2 I C, for r.
    rest = hardware.memory_bandwidth / hardware.bf16_flops - 1 / inner - 1 / columns
    return 1 / rest if rest > 0 else None


def expert_forward_time(
    load: ExpertLoad, dim: float, hidden_dim: float, hardware: Hardware
) -> Array:
    """Seconds of the grouped products w1, w3 (D to F) and w2 (F to D) on the busiest device.

    The backward pass takes twice as long: each product has one for the gradient of its
    input and one for that of its weight, of the same size.
    """
    hot, hot_rows, others, other_rows = load.gemms()
    return hot * mlp_time(hot_rows, dim, hidden_dim, hardware) + others * mlp_time(
        other_rows, dim, hidden_dim, hardware
    )


def mlp_time(rows: ArrayLike, dim: float, hidden_dim: float, hardware: Hardware) -> Array:
    """Seconds of the three products of one SwiGLU expert on ``rows`` tokens, forward."""
    into = gemm_time(rows, dim, hidden_dim, hardware)
    return 2 * into + gemm_time(rows, hidden_dim, dim, hardware)
