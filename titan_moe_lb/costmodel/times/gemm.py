"""Roofline times of matrix products: either arithmetic or memory is the limit."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from titan_moe_lb.costmodel.hardware.device import Hardware
from titan_moe_lb.costmodel.loads.expert_load import Array

BF16_BYTES = 2
FP32_BYTES = 4


def gemm_time(rows: ArrayLike, inner: float, columns: float, hardware: Hardware) -> Array:
    """Time of ``(rows, inner) x (inner, columns)`` in BF16, in seconds.

    ``max(FLOPs / peak, bytes / bandwidth)``, the roofline model of Williams, Waterman and
    Patterson (CACM 52(4), 2009). Each operand is moved once.
    """
    rows = np.asarray(rows, dtype=np.float64)
    arithmetic = 2 * rows * inner * columns / hardware.bf16_flops
    elements = rows * inner + inner * columns + rows * columns
    memory = BF16_BYTES * elements / hardware.memory_bandwidth
    return np.where(rows > 0, np.maximum(arithmetic, memory), 0.0)[()]


def turning_rows(inner: float, columns: float, hardware: Hardware) -> float | None:
    """Rows at which the arithmetic of a product takes as long as moving its operands.

    With more rows the arithmetic is the limit. None if memory is the limit at any number.
    """
    # Solve 2 r I C / F = 2 (r I + I C + r C) / M for r, after division by 2 I C.
    rest = hardware.memory_bandwidth / hardware.bf16_flops - 1 / inner - 1 / columns
    return 1 / rest if rest > 0 else None


def mlp_time(rows: ArrayLike, dim: float, hidden_dim: float, hardware: Hardware) -> Array:
    """Forward time of one SwiGLU expert's three products on ``rows`` tokens, in seconds."""
    into = gemm_time(rows, dim, hidden_dim, hardware)
    return 2 * into + gemm_time(rows, hidden_dim, dim, hardware)
