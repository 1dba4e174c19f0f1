"""What the gates of a job compute in mixed precision, on the ranks of a pool."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from titan_moe_lb.balancing.router import routers_of
from titan_moe_lb.job import job_config
from titan_moe_lb.parallel.local_shard import local_shard
from titan_moe_lb.upstream import cpu


def gates(arguments: list[str]) -> list[tuple[torch.dtype, torch.dtype, float, torch.dtype, bool]]:
    """In one step, of each router of this rank: the dtypes of its input and scores, the largest
    error of the scores beside float64, the dtype of the gate's gradient, whether it is not 0."""
    config = job_config.load(["--debug.no-enable-structured-logging", *arguments]).config
    cpu.adapt(config)
    config.training.steps = 1
    config.metrics.write_moe_trace = False
    trainer = config.build()
    seen = {}

    def look(router, args, output) -> None:
        x_BLD, weight_ED = local_shard(args[0]), local_shard(router.gate.weight)
        exact = F.linear(x_BLD.double(), weight_ED.double())
        exact = exact.softmax(-1) if router.score_func == "softmax" else exact.sigmoid()
        scores = local_shard(output[2])
        seen[router] = (x_BLD.dtype, scores.dtype, (scores - exact).abs().max().item())

    routers = routers_of(trainer.model_parts)
    for router in routers:
        router.register_forward_hook(look)
    trainer.train_step(trainer.batch_generator(trainer.dataloader))
    trainer.close()
    found = []
    for router in routers:
        gradient = local_shard(router.gate.weight.grad)
        found.append((*seen[router], gradient.dtype, bool(gradient.abs().max() > 0)))
    return found
