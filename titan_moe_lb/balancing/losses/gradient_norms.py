"""How strong the model's own loss and the aux losses pull at a router, measured apart.

Where it is asked for, the scores are computed twice from the same logits: the experts are weighed
by the first, the aux losses are attached to the second. What comes back to the logits on either
way is measured and goes on to the gate, so that its gradient is the same sum as without.

The measure of a way is the sum of the squares of its gradient in the logits ``(T, E)`` over all
tokens of the step: it does not depend on how the batch is cut. It is handed to a leaf as its
gradient, which a compiler, a recomputation and a pipeline accumulate as those of any parameter.
"""

from __future__ import annotations

import spmd_types as spmd
import torch

from titan_moe_lb.balancing.losses.injection import gradient_of_sums
from titan_moe_lb.parallel.local_shard import local_shard, placed_as


def measured(logits_BLE: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """The logits; in the backward, the squares of their gradient are added to ``squares.grad``.

    Args:
        logits_BLE: ``(B, L, E)``.
        squares: float32 ``()``, part of a leaf.
    """
    with spmd.no_typecheck():
        local_BLE = _Measured.apply(local_shard(logits_BLE), squares)
    return placed_as(logits_BLE, local_BLE)


class _Measured(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_BLE, squares):
        return logits_BLE.view_as(logits_BLE)

    @staticmethod
    def backward(ctx, grad_BLE):
        return grad_BLE, grad_BLE.float().square().sum()


def taught(
    chosen_BLK: torch.Tensor,
    scores_BLE: torch.Tensor,
    coefficients_BE: torch.Tensor | None,
    inverse_sums_BL: torch.Tensor | None,
    document_BL: torch.Tensor | None,
) -> torch.Tensor:
    """The chosen scores as they are; in the backward ``scores_BLE`` gets the gradient of the losses
    of sums, which is no part of that of ``chosen_BLK``.

    Args: as for :func:`titan_moe_lb.balancing.losses.injection.gather_scores`; no coefficients: no such loss.
    """
    with spmd.no_typecheck():
        return _Taught.apply(chosen_BLK, scores_BLE, coefficients_BE, inverse_sums_BL, document_BL)


class _Taught(torch.autograd.Function):
    @staticmethod
    def forward(ctx, chosen_BLK, scores_BLE, coefficients_BE, inverse_sums_BL, document_BL):
        ctx.save_for_backward(scores_BLE, coefficients_BE, inverse_sums_BL, document_BL)
        return chosen_BLK.view_as(chosen_BLK)

    @staticmethod
    def backward(ctx, grad_BLK):
        scores_BLE, coefficients_BE, inverse_sums_BL, document_BL = ctx.saved_tensors
        if coefficients_BE is None:
            return grad_BLK, torch.zeros_like(scores_BLE), None, None, None
        grad_BLE = gradient_of_sums(scores_BLE, coefficients_BE, inverse_sums_BL, document_BL)
        return grad_BLK, grad_BLE, None, None, None
