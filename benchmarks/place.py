"""Step time before and after ``titan-moe-lb place``, for a job with a hot rank on this host.

    python -m benchmarks.place [--repetitions 11] [--module NAME] [--config NAME]

Two gloo processes with expert parallelism train a model for two steps. A bias prefers the first
half of the experts, which the first rank holds. ``place`` then places the checkpoint by the loads
of these steps. One trainer takes steps from both checkpoints in turn, in alternating order. The
results are medians of the slower rank's times, and the ratio that ``titan-moe-lb plan`` predicts
for this host from the same run. Prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import tyro

from titan_moe_lb.upstream import cpu

if cpu.needed():
    cpu.use_host()

import torch.distributed.checkpoint as dcp
from torchtitan.trainer import Trainer

from benchmarks.host_hardware import as_toml, measure_host
from titan_moe_lb.balancing.router import moe_layers_of
from titan_moe_lb.commands.place.command import place
from titan_moe_lb.commands.plan.command import make_plan
from titan_moe_lb.commands.plan.plan_arguments import PlanArguments
from titan_moe_lb.parallel import single_process
from titan_moe_lb.run.train import trainer_config

RANKS = 2
STEPS = 2
"""Steps before the checkpoint."""


@dataclass
class Arguments:
    """Flags of the benchmark."""

    module: str = "benchmarks.wide_experts"
    config: str = "wide_experts"
    repetitions: int = 11

    @property
    def job(self) -> tuple[str, ...]:
        """Flags of the job."""
        # The speed is so low that the bias hardly changes in a few steps.
        bias = '{type = "sign", speed = 1e-9}'
        return ("--module", self.module, "--config", self.config, "--model.expert_bias", bias)


def main() -> None:
    """Measure and predict the ratio of step times, and print both."""
    arguments = tyro.cli(Arguments)
    folder = Path(tempfile.mkdtemp())
    try:
        single_process.announce()
        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        torch.multiprocessing.spawn(_rank, args=(arguments, folder, store.port), nprocs=RANKS)
        device = folder / "host.toml"
        device.write_text(as_toml(measure_host()))
        flags = PlanArguments(
            hardware=str(device),
            ranks=RANKS,
            ep=str(RANKS),
            from_run=folder / "recorded",
            job_flags=arguments.job,
        )
        rows = {row.placement: row.last for row in make_plan(flags).degrees[0].measured}
        measured = json.loads((folder / "measured.json").read_text())
    finally:
        shutil.rmtree(folder)
    predicted = rows["contiguous"].step_seconds / rows["greedy"].step_seconds
    print(
        json.dumps(
            {
                "config": arguments.config,
                **measured,
                "ratio": round(measured["before_s"] / measured["placed_s"], 3),
                "predicted": round(predicted, 3),
                "pairs": arguments.repetitions,
            }
        )
    )


def _rank(rank: int, arguments: Arguments, folder: Path, port: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS))
    os.environ.update(MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    torch.set_num_threads(1)
    trainer = _trained(arguments, folder / "run")
    if rank == 0:
        for line in place(folder / "run", output=folder / "placed", ep=RANKS):
            print(line)
        # The timed steps would continue the trace of the run.
        without = shutil.ignore_patterns("checkpoint")
        shutil.copytree(folder / "run", folder / "recorded", ignore=without)
    dist.barrier()
    seconds = _in_turn(trainer, folder, arguments.repetitions)
    slower = torch.tensor(seconds)
    dist.all_reduce(slower, op=dist.ReduceOp.MAX)
    if rank == 0:
        before, placed = (round(statistics.median(one), 4) for one in slower.tolist())
        text = json.dumps({"before_s": before, "placed_s": placed})
        (folder / "measured.json").write_text(text)
    trainer.close()
    dist.destroy_process_group()


def _trained(arguments: Arguments, run: Path) -> Trainer:
    trainer = trainer_config(
        *arguments.job,
        "--parallelism.data_parallel_shard_degree=2",
        "--parallelism.expert_parallel_degree=2",
        "--checkpoint.enable",
        f"--training.steps={STEPS}",
        f"--lr_scheduler.total_steps={STEPS + 2 * (arguments.repetitions + 1)}",
        "--debug.no-enable-structured-logging",
        f"--dump_folder={run}",
    ).build()
    for layer in moe_layers_of(trainer.model_parts):
        layer.expert_bias_E[: layer.router.num_experts // RANKS] += 1.0
    trainer.train()
    return trainer


def _in_turn(trainer: Trainer, folder: Path, repetitions: int) -> list[list[float]]:
    """Seconds of a step from each checkpoint, original and placed, ``(2, repetitions)``."""
    (model,) = trainer.model_parts
    checkpoints = [folder / name / "checkpoint" / f"step-{STEPS}" for name in ("run", "placed")]
    seconds: list[list[float]] = [[], []]
    batches = trainer.batch_generator(trainer.dataloader)
    for repetition in range(repetitions + 1):
        for side in (0, 1) if repetition % 2 else (1, 0):
            dcp.load(model.state_dict(), checkpoint_id=checkpoints[side])
            trainer.step += 1
            dist.barrier()
            started = time.perf_counter()
            trainer.train_step(batches)
            dist.barrier()
            if repetition:  # the first one warms up
                seconds[side].append(time.perf_counter() - started)
    return seconds


if __name__ == "__main__":
    main()
