"""Kernels of a compiled router, and the bytes that they read and write, beside torchtitan's router."""

from __future__ import annotations

from benchmarks.router_cost import BASELINE, routers
from benchmarks.router_kernels import compiled_cost


def test_kernels_and_bytes_of_a_compiled_router():
    """Forward and backward of 4 rows of 512 tokens, 256 experts, group-limited."""
    default, three = "ours, DeepSeek-V3's default", "ours, three losses"
    kernels, num_bytes = {}, {}
    for name, router in routers().items():
        if name in (BASELINE, default, three):
            kernels[name], num_bytes[name] = compiled_cost(router)
    assert num_bytes[BASELINE] > 4 * 2048 * 256
    assert kernels[default] - kernels[BASELINE] <= 10
    assert kernels[three] - kernels[BASELINE] <= 14
    assert num_bytes[default] <= 1.10 * num_bytes[BASELINE]
    assert num_bytes[three] <= 1.25 * num_bytes[BASELINE]
