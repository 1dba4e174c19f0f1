"""Difference between the aux gradient with the previous step's counts and with the step's own.

    python -m benchmarks.previous_step_counts [--steps 50] [--config deepseek_v3_debugmodel]

Trains with the global-batch loss. At every step it computes the aux gradient of all gates twice,
on the same batch and weights. One uses f from the previous step, as in training; the other uses f
from the step itself, as the paper defines it. Prints the cosine of the two gradients and the ratio
of their norms.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from dataclasses import dataclass

import torch
import tyro

from titan_moe_lb.upstream import cpu

if cpu.needed():
    cpu.use_host()

from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.trainer import Trainer

from titan_moe_lb.balancing.losses import GlobalBatchAuxLoss
from titan_moe_lb.balancing.router import LoadBalancedRouter, routers_of
from titan_moe_lb.job import job_config
from titan_moe_lb.parallel import single_process
from titan_moe_lb.parallel.local_shard import local_shard


@dataclass
class Arguments:
    """Flags of the benchmark."""

    steps: int = 50
    config: str = "deepseek_v3_debugmodel"


def main() -> None:
    """Train, compare the two gradients at every step, and print the result."""
    arguments = tyro.cli(Arguments)
    single_process.announce()
    trainer = _trainer(arguments)
    batches = trainer.batch_generator(trainer.dataloader)
    routers = routers_of(trainer.model_parts)
    cosines, ratios = [], []
    for step in range(1, arguments.steps + 1):
        inputs, labels = next(batches)
        if step > 1:  # the first step has no previous one
            late = _aux_gradient(trainer, inputs, labels)
            record = routers[0].step_record
            counts_NE = record.counts_NMSE[:, :, 0].sum(dim=1)
            previous = [load_E.clone() for load_E in _loads(routers)]
            GlobalBatchAuxLoss.finish_step(
                [router.aux_losses["global_batch"] for router in routers], counts_NE
            )
            true = _aux_gradient(trainer, inputs, labels)
            torch._foreach_copy_(_loads(routers), previous)
            record.finish_step(trainer.config.training.local_batch_size)
            cosines.append(torch.cosine_similarity(late, true, dim=0).item())
            ratios.append((late.norm() / true.norm()).item())
        trainer.step = step
        trainer.train_step(iter([(inputs, labels)]))
    print(
        json.dumps(
            {
                "config": arguments.config,
                "steps": arguments.steps,
                "cosine": {
                    "median": statistics.median(cosines),
                    "lowest": min(cosines),
                    "first_ten": statistics.median(cosines[:10]),
                    "last_ten": statistics.median(cosines[-10:]),
                },
                "norm_ratio_median": statistics.median(ratios),
            }
        )
    )


def _loads(routers: list[LoadBalancedRouter]) -> list[torch.Tensor]:
    """List f of each layer's loss, as this rank holds it."""
    return [local_shard(router.aux_losses["global_batch"].load_E) for router in routers]


def _aux_gradient(trainer: Trainer, inputs: dict, labels: torch.Tensor) -> torch.Tensor:
    """Compute the gradient of the aux loss alone in all gates, flattened."""
    trainer.optimizers.zero_grad()
    trainer.forward_backward_step(
        input_dict={name: value.to(trainer.device) for name, value in inputs.items()},
        labels=torch.full_like(labels, IGNORE_INDEX, device=trainer.device),
        global_valid_tokens=torch.tensor(1, device=trainer.device),
    )
    return torch.cat(
        [
            router.gate.weight.grad.to_local().flatten().clone()
            for router in routers_of(trainer.model_parts)
        ]
    )


def _trainer(arguments: Arguments) -> Trainer:
    flags = ["--config", arguments.config, "--debug.seed=0", "--metrics.log_freq=1000"]
    flags += [f"--training.steps={arguments.steps}", f"--dump_folder={tempfile.mkdtemp()}"]
    losses = '[{type="global_batch", weight=1e-3}]'
    config = job_config.load([*flags, f"--model.aux_losses={losses}"]).config
    config.debug.enable_structured_logging = False
    if cpu.needed():
        cpu.adapt(config)
    return config.build()


if __name__ == "__main__":
    main()
