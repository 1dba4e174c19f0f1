"""Time of the cost model for a sweep of a million points at once, on one core.

    OMP_NUM_THREADS=1 python -m benchmarks.costmodel_sweep

The points have random imbalance, expert-parallel degree, tokens and hot experts, for 256 experts
and top 8. Prints one line of JSON: seconds for the load, the skew and the all-to-all of all points.
"""

from __future__ import annotations

import json
import statistics
import timeit

import numpy as np

from titan_moe_lb.costmodel import all_to_all_time, expert_load, receiver_skew

POINTS = 1_000_000


def main() -> None:
    """Time the sweep, and print its median."""
    random = np.random.default_rng(0)
    axes = {
        "ep_degree": 2 ** random.integers(0, 9, POINTS),
        "imbalance_factor": random.uniform(1, 32, POINTS),
        "num_hot_experts": random.integers(1, 9, POINTS),
    }
    tokens = random.integers(1, 1_000_000, POINTS)
    model = {"num_experts": 256, "top_k": 8}

    def sweep() -> None:
        expert_load(**model, **axes, num_tokens=tokens)
        skew = receiver_skew(**model, **axes)
        all_to_all_time(
            num_bytes=tokens * (8 * 7168 * 2),
            ep_degree=axes["ep_degree"],
            bandwidth=50e9,
            latency=2.7e-6,
            skew=skew,
        )

    seconds = timeit.repeat(sweep, number=1, repeat=5)
    print(json.dumps({"points": POINTS, "median_s": statistics.median(seconds)}))


if __name__ == "__main__":
    main()
