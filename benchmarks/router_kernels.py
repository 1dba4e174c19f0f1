"""Kernels of a compiled router: their number, and the bytes that they read and write.

    python -m benchmarks.router_kernels

Compiles forward and backward of the four routers of :mod:`benchmarks.router_cost` for 4 rows of 512
tokens, and prints a table. Both numbers are inductor's. ``generated_kernel_count`` counts loop
nests, not library calls. The bytes are the inputs and outputs of every kernel and library call.
"""

from __future__ import annotations

import torch
from torch._inductor import metrics
from torchtitan.models.common.moe import TokenChoiceTopKRouter

from benchmarks.router_cost import DIM, EXPERTS, routers

SEQUENCES, LENGTH = 4, 512


def main() -> None:
    """Compile all routers, and print the table."""
    print("| router | kernels | bytes | of torchtitan's |\n|---|---|---|---|")
    base = 0
    for name, router in routers().items():
        kernels, num_bytes = compiled_cost(router)
        base = base or num_bytes
        print(f"| {name} | {kernels} | {num_bytes:,} | {num_bytes / base:.2f} |", flush=True)


def compiled_cost(router: TokenChoiceTopKRouter) -> tuple[int, int]:
    """Compile a router's forward and backward: number of kernels, and bytes."""
    x_BLD = torch.randn(SEQUENCES, LENGTH, DIM, requires_grad=True)
    bias_E = torch.zeros(EXPERTS)
    torch._dynamo.reset()
    metrics.reset()
    torch._logging.set_logs(inductor_metrics=True)  # without it, bytes are not counted
    try:
        with torch._inductor.config.patch(fx_graph_cache=False):
            torch.compile(lambda: router(x_BLD, bias_E)[0], fullgraph=True)().sum().backward()
    finally:
        torch._logging.set_logs()
        torch._dynamo.reset()
    return metrics.generated_kernel_count, metrics.num_bytes_accessed


if __name__ == "__main__":
    main()
