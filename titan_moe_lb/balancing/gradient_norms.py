"""Gradients of the model's own loss and of the aux losses at a router, measured apart.

The scores are computed twice from the same logits: the experts are weighed by the first, the aux
losses are attached to the second. The gradient in the logits is measured on both ways and goes on
to the gate, so that the gate learns from the same sum as without.

The measure of a way is the sum of the squares of its gradient in the logits ``(T, E)`` over all
tokens of the step: it does not depend on how the batch is cut. It is accumulated as the gradient of
a leaf, which a compiler, a recomputation and a pipeline handle as that of any parameter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import spmd_types as spmd
import torch

from titan_moe_lb.balancing.valid_tokens.batch_tokens import BatchTokens
from titan_moe_lb.functional import attached_gradient
from titan_moe_lb.parallel.local_shard import local_shard, placed_as

if TYPE_CHECKING:
    from titan_moe_lb.balancing.router import LoadBalancedRouter


class GradientNorms:
    """Stand in for the two methods by which losses reach a router."""

    def __init__(self, router: LoadBalancedRouter, squares_2: torch.Tensor) -> None:
        """
        Args:
            squares_2: part of a float32 leaf; its gradient is the squares of the gradient of the
                model's loss, and of the aux losses.
        """
        self._squares_2 = squares_2
        self._attach, self._score = router.attach_losses, router.score
        router.attach_losses, router.gather = self.attach_losses, self.gather  # type: ignore[method-assign]

    def attach_losses(self, logits_BLE: torch.Tensor, tokens: BatchTokens | None) -> torch.Tensor:
        """As that of the router, on the way of the aux losses."""
        return self._attach(_measured(logits_BLE, self._squares_2[1]), tokens)

    def gather(
        self,
        logits_BLE: torch.Tensor,
        scores_BLE: torch.Tensor,
        ids_BLK: torch.Tensor,
        coefficients_BE: torch.Tensor | None,
        *losses: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As that of the router: the scores from the way of the model's loss."""
        main_BLE = self._score(_measured(logits_BLE, self._squares_2[0]))
        chosen_BLK = local_shard(main_BLE).gather(-1, ids_BLK)
        with spmd.no_typecheck():
            chosen_BLK = _AttachApart.apply(
                chosen_BLK, local_shard(scores_BLE), coefficients_BE, *losses
            )
        return main_BLE, placed_as(main_BLE, chosen_BLK)


def _measured(logits_BLE: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """The logits; the backward adds the squares of their gradient to ``squares.grad``."""
    with spmd.no_typecheck():
        local_BLE = _Measure.apply(local_shard(logits_BLE), squares)
    return placed_as(logits_BLE, local_BLE)


class _Measure(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_BLE, squares):
        return logits_BLE.view_as(logits_BLE)

    @staticmethod
    def backward(ctx, grad_BLE):
        return grad_BLE, grad_BLE.float().square().sum()


class _AttachApart(torch.autograd.Function):
    """The chosen scores; ``scores_BLE`` gets the gradient of the losses of sums, and no other."""

    @staticmethod
    def forward(ctx, chosen_BLK, scores_BLE, coefficients_BE, inverse_sums_BL, document_BL):
        ctx.save_for_backward(scores_BLE, coefficients_BE, inverse_sums_BL, document_BL)
        return chosen_BLK.view_as(chosen_BLK)

    @staticmethod
    def backward(ctx, grad_BLK):
        scores_BLE, coefficients_BE, *losses = ctx.saved_tensors
        if coefficients_BE is None:
            grad_BLE = torch.zeros_like(scores_BLE)
        else:
            grad_BLE = attached_gradient(scores_BLE, coefficients_BE, *losses)
        return grad_BLK, grad_BLE, None, None, None
