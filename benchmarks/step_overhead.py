"""Overhead of the losses, or of the telemetry, in a whole training step.

    python -m benchmarks.step_overhead [--of telemetry] [--steps 12] [--config NAME]

Two trainers of the same job step in turn in one process. For the losses, torchtitan's own router
is compared with ours with the sequence-wise, global-batch and z losses. For the telemetry, the
registry's job runs with ``track_moe_metrics`` off and on, and logs every step. Prints the medians,
and the median and quartiles of the overhead over pairs of steps.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import tyro

from titan_moe_lb.upstream import cpu

if cpu.needed():
    cpu.use_host()

from torchtitan.config.override import derive
from torchtitan.models.common.moe import TokenChoiceTopKRouter
from torchtitan.trainer import Trainer

from benchmarks.device_time import interleaved
from titan_moe_lb.balancing.router import LoadBalancedRouter
from titan_moe_lb.job import job_config
from titan_moe_lb.parallel import single_process

LOSSES = (
    '[{type="sequence_wise", weight=1e-4}, {type="global_batch", weight=1e-3}, '
    '{type="z_loss", weight=1e-5}]'
)


@dataclass
class Arguments:
    """Flags of the benchmark."""

    of: Literal["losses", "telemetry"] = "losses"
    steps: int = 12
    config: str = "deepseek_v3_debugmodel"


def main() -> None:
    """Step both trainers in turn, and print their times."""
    arguments = tyro.cli(Arguments)
    single_process.announce()
    sides = {"without": _trainer(arguments, on=False), "with": _trainer(arguments, on=True)}
    runs = {name: _stepping(side) for name, side in sides.items()}
    seconds = interleaved(runs, arguments.steps, sides["with"].device)
    pairs = [(w - o) / o * 100 for w, o in zip(seconds["with"], seconds["without"], strict=True)]
    low, middle, high = statistics.quantiles(pairs, n=4)
    print(
        json.dumps(
            {
                "of": arguments.of,
                "config": arguments.config,
                "without_s": statistics.median(seconds["without"]),
                "with_s": statistics.median(seconds["with"]),
                "overhead_percent": middle,
                "quartiles_percent": [low, high],
                "pairs": len(pairs),
            }
        )
    )


def _stepping(trainer: Trainer) -> Callable[[], None]:
    batches = trainer.batch_generator(trainer.dataloader)
    trainer.step = 2

    def step() -> None:
        # Step 3 is not logged (log_freq is 1000); losses act in such steps, too.
        trainer.step += 1
        trainer.train_step(batches)

    return step


def _trainer(arguments: Arguments, *, on: bool) -> Trainer:
    flags = ["--config", arguments.config, "--debug.seed=0"]
    flags += [f"--dump_folder={tempfile.mkdtemp()}"]
    if arguments.of == "losses":
        flags += ["--metrics.log_freq=1000", f"--model.aux_losses={LOSSES if on else '[]'}"]
    else:
        flags += ["--metrics.log_freq=1"]
        flags += [] if on else ["--metrics.no-track-moe-metrics"]
    config = job_config.load(flags).config
    config.debug.enable_structured_logging = False
    if arguments.of == "losses" and not on:
        for _fqn, router, parent, name in list(config.traverse(LoadBalancedRouter.Config)):
            setattr(parent, name, derive(router, TokenChoiceTopKRouter.Config))
    if cpu.needed():
        cpu.adapt(config)
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    return config.build()


if __name__ == "__main__":
    main()
