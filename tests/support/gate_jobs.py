"""Gates with adapters, and the results of a job's gates in mixed precision."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torchtitan.components.lora import LoRAConverter
from torchtitan.models.common.moe import TokenChoiceTopKRouter

from tests.support.textbook import SCORES
from tests.support.train_jobs import build
from titan_moe_lb.balancing.router import routers_of
from titan_moe_lb.job import job_config
from titan_moe_lb.parallel.local_shard import local_shard


def lora_gate(built: TokenChoiceTopKRouter, dtype: torch.dtype) -> torch.nn.Module:
    """Make the gate of a router with adapters, as torchtitan's LoRA does."""
    config = LoRAConverter.Config(rank=4, alpha=8.0).build()._make_lora_config(built.config.gate)
    gate = config.build()
    for seed, weight in enumerate(gate.parameters()):
        torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(seed))
    return gate.to(dtype)


def gates(arguments: list[str]) -> list[tuple[torch.dtype, torch.dtype, float, torch.dtype, bool]]:
    """Train one step; describe each router of this rank.

    Returns:
        The dtypes of its input and scores, the largest error of the scores against float64, the
        dtype of the gate's gradient, and whether that is not 0.
    """
    config = job_config.load(["--debug.no-enable-structured-logging", *arguments]).config
    config.training.steps = 1
    config.metrics.write_moe_trace = False
    trainer = build(config)
    seen = {}

    def look(router, args, output) -> None:
        x_BLD, weight_ED = local_shard(args[0]), local_shard(router.gate.weight)
        exact = F.linear(x_BLD.double(), weight_ED.double())
        exact = SCORES[router.score_func](exact)
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
