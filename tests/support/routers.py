"""Router alone in its process, and torchtitan's own with the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from torchtitan.config.override import derive
from torchtitan.models.common.config_utils import make_router_config
from torchtitan.models.common.moe import TokenChoiceTopKRouter

from tests.support.textbook import SCORES
from titan_moe_lb.balancing.expert_bias import ExpertBias
from titan_moe_lb.balancing.losses import AuxLoss, SequenceWiseAuxLoss
from titan_moe_lb.balancing.recording.training_loop import TrainingLoop
from titan_moe_lb.balancing.router import LoadBalancedRouter
from titan_moe_lb.balancing.step_hook import wire
from titan_moe_lb.balancing.valid_tokens.batch_tokens import batch_tokens, document_numbers
from titan_moe_lb.parallel.rank_groups import RankGroups

DIM, EXPERTS, TOP_K, ROWS, LENGTH = 32, 8, 2, 3, 20
BOUND = {"num_experts": EXPERTS, "top_k": TOP_K}
GROUPS = {"num_expert_groups": 4, "num_limited_groups": 2}
WHOLE = torch.ones(ROWS, LENGTH, dtype=torch.bool)
PADDED = torch.arange(LENGTH) < torch.tensor([[LENGTH], [11], [4]])
DOCUMENTS = document_numbers(
    torch.cat([torch.arange(7), torch.arange(3), torch.arange(10)]).repeat(ROWS, 1)
)
"""Three documents in each row."""


class OtherScores(TokenChoiceTopKRouter):
    """torchtitan's router, with the textbook formula of a score function that it lacks."""

    def forward(self, x_BLD, expert_bias_E=None):
        name, self.score_func = self.score_func, "sigmoid"
        with mock.patch.object(torch, "sigmoid", SCORES[name]):
            result = super().forward(x_BLD, expert_bias_E)
        self.score_func = name
        return result


def upstream_router(score_func: str = "sigmoid", **options: Any) -> TokenChoiceTopKRouter:
    """torchtitan's router of 8 experts on 32 features, top 2."""
    return _initialised(OtherScores(_config(score_func, **options)))


def router(
    losses: Sequence[AuxLoss.Config] = (),
    score_func: str = "sigmoid",
    *,
    expert_bias: ExpertBias.Config | None = None,
    loop: TrainingLoop | None = None,
    dtype: torch.dtype = torch.float32,
    frozen: frozenset[str] = frozenset(),
    **options: Any,
) -> LoadBalancedRouter:
    """Router with the weights of :func:`upstream_router` and with losses, wired to batches of
    ``ROWS`` rows."""
    config = derive(_config(score_func, **options), LoadBalancedRouter.Config)
    config.aux_losses, config.expert_bias = list(losses), expert_bias
    config.frozen = frozen
    config.bind()
    if loop is not None:
        config.loop = loop
    return wired(_initialised(config.build()).to(dtype))


def wired(built: LoadBalancedRouter, rows: int = ROWS) -> LoadBalancedRouter:
    """Wire a router and give its losses their weights in a step of ``rows`` rows."""
    record = wire([built], RankGroups())
    weights = [loss.config.weight / rows for loss in built.aux_losses.values()]
    if record is not None:
        record.weights_A.copy_(torch.tensor(weights))
    return built


def with_mask(
    built: LoadBalancedRouter, valid: torch.Tensor, documents: torch.Tensor | None = None
) -> LoadBalancedRouter:
    """Give the next forwards of a router the valid tokens and documents of their rows."""
    built.tokens = batch_tokens(valid, documents, max_documents=3, slices=[(0, LENGTH)])
    return built


def values(built: LoadBalancedRouter) -> list[float]:
    """Raw value of each loss in one forward: a mean over the rows."""
    return (built.record.losses_A / ROWS).tolist()


def sequence_wise(count_from: str = "selected", weight: float = 0.5) -> SequenceWiseAuxLoss.Config:
    return SequenceWiseAuxLoss.Config(weight=weight, count_from=count_from)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Make an input ``(ROWS, LENGTH, DIM)`` and an expert bias ``(EXPERTS,)``."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, LENGTH, DIM, generator=generator).to(dtype).requires_grad_()
    return x, 0.2 * torch.randn(EXPERTS, generator=generator).to(dtype)


def _config(score_func: str, **options: Any) -> TokenChoiceTopKRouter.Config:
    return make_router_config(
        dim=DIM,
        num_experts=EXPERTS,
        gate_param_init={},
        score_func=score_func,
        **{"top_k": TOP_K} | options,
    )


def _initialised(built: Any) -> Any:
    torch.nn.init.normal_(built.gate.weight, generator=torch.Generator().manual_seed(3))
    return built
