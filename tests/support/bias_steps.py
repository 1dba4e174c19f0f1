"""Bias rule and one finished step for it."""

from __future__ import annotations

import torch

from titan_moe_lb.balancing.expert_bias import BiasStep, ExpertBias


def built(
    config: ExpertBias.Config,
    num_experts: int = 4,
    top_k: int = 2,
    score_func: str = "sigmoid",
) -> ExpertBias:
    config.bind(num_experts=num_experts, top_k=top_k)
    config.score_func = score_func
    return config.build()


def step_of(counts: torch.Tensor, **others) -> BiasStep:
    return BiasStep(bias_NE=torch.zeros(counts.shape), counts_NE=counts, **others)
