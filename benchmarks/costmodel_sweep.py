"""Time of the cost model for a sweep of many points at once, on one core.

    OMP_NUM_THREADS=1 python -m benchmarks.costmodel_sweep [--points 1000000]

The points have random imbalance, expert-parallel degree, tokens and hot experts, for 256 experts
and top 8. Prints one line of JSON: seconds for the load, the skew and the all-to-all of all points.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

import numpy as np
import tyro

from titan_moe_lb.costmodel import all_to_all_time, expert_load, receiver_skew


@dataclass
class Arguments:
    """Flags of the benchmark."""

    points: int = 1_000_000
    repetitions: int = 5


def main() -> None:
    """Time the sweep, and print its median."""
    arguments = tyro.cli(Arguments)
    random = np.random.default_rng(0)
    size = arguments.points
    axes = {
        "ep_degree": 2 ** random.integers(0, 9, size),
        "imbalance_factor": random.uniform(1, 32, size),
        "num_hot_experts": random.integers(1, 9, size),
    }
    tokens = random.integers(1, 1_000_000, size)
    model = {"num_experts": 256, "top_k": 8}
    seconds = []
    for _ in range(arguments.repetitions):
        started = time.perf_counter()
        load = expert_load(**model, **axes, num_tokens=tokens)
        skew = receiver_skew(**model, **axes)
        exchange = all_to_all_time(
            num_bytes=tokens * (8 * 7168 * 2),
            ep_degree=axes["ep_degree"],
            bandwidth=50e9,
            latency=2.7e-6,
            skew=skew,
        )
        seconds.append(time.perf_counter() - started)
    assert load.tokens_on_device.shape == exchange.shape == (size,)
    print(json.dumps({"points": size, "median_s": sorted(seconds)[len(seconds) // 2]}))


if __name__ == "__main__":
    main()
