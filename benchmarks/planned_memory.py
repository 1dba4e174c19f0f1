"""Planned memory, compared with torch's live storages in a real step on gloo, by layout.

    OMP_NUM_THREADS=1 python -m benchmarks.planned_memory [--only NAME ...] [--flags=...]

Trains a small model with balanced routing on two or four processes of this host. Prints the rows of
the table in docs/evidence/planned_memory.md. For every pipeline position they contain the planned
peak, and the measured peak of live storages in the second optimizer step.
"""

from __future__ import annotations

from dataclasses import dataclass

import tyro

from tests.support import memory_jobs
from tests.support.memory_jobs import BALANCED, LAYOUTS
from tests.support.rank_pool import RankPool


@dataclass
class Arguments:
    """Flags of the benchmark."""

    only: tuple[str, ...] = ()
    """Names of layouts, or parts of them."""
    config: str = "deepseek_v3_tiny"
    """Name of the job's config, ``<module>_<flavor>``."""
    flags: str = "--training.local_batch_size=16"
    """Further flags of the job, in one argument."""


def main() -> None:
    """Plan and measure every layout, and print the table."""
    arguments = tyro.cli(Arguments)
    print("| layout | rank | planned MB | measured MB | planned / measured |")
    print("|---|---|---|---|---|")
    with RankPool(4) as pool:
        for name, (ranks, layout) in LAYOUTS.items():
            if arguments.only and not any(part in name for part in arguments.only):
                continue
            module = arguments.config.rpartition("_")[0]
            model = ["--module", module, "--config", arguments.config]
            job = [*model, BALANCED, *arguments.flags.split(), *layout]
            ((planned,), measured) = (
                pool.run(1, memory_jobs.planned_bytes, job, ranks),
                pool.run(ranks, memory_jobs.measured_bytes, job),
            )
            for rank, expected in planned.items():
                held = measured[rank]
                print(
                    f"| {name} | {rank} | {expected / 1e6:.2f} | {held / 1e6:.2f} "
                    f"| {expected / held:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
