"""Planned memory beside torch's own account of a real step on gloo, layout by layout.

    OMP_NUM_THREADS=1 python -m benchmarks.planned_memory [--only NAME ...] [--flags=...]

A small model on two or four processes of this host, balanced routing. Prints the rows of the
table in docs/evidence/planned_memory.md: of every pipeline position the peak of live storages in the second
optimizer step, and what is planned for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import tyro

from tests.support import memory_jobs
from tests.support.memory_jobs import BALANCED, LAYOUTS
from tests.support.rank_pool import RankPool


@dataclass
class Arguments:
    only: tuple[str, ...] = ()
    """Names of layouts, or parts of them."""
    config: str = "deepseek_v3_tiny"
    """Module and flavor."""
    flags: str = "--training.local_batch_size=16"
    """Of the job, in one argument."""


def main() -> None:
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
