"""Gradient norms of the model's loss and of the aux losses at a router, measured separately.

The router computes the scores twice from the same logits. The first scores weight the outputs of
the experts; the aux losses are attached to the second. Each path measures its gradient in the
logits and passes it on to the gate, so the gate learns from the same sum as without measurement.
A step that is left out has only the router's own path, and costs nothing.

The measure of a path is the sum of the squares of its gradient in the logits ``(T, E)`` over all
tokens of the step. It does not depend on how the batch is cut. It is accumulated as the gradient
of a leaf, which compilers, recomputation and pipelines treat like the gradient of a parameter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from titan_moe_lb.balancing.score_functions import SCORE_FUNCTIONS
from titan_moe_lb.balancing.valid_tokens.batch_tokens import BatchTokens
from titan_moe_lb.functional import attached_gradient
from titan_moe_lb.parallel.local_shard import local_shard, placed_as, untyped

if TYPE_CHECKING:
    from titan_moe_lb.balancing.recording.step_record import StepRecord
    from titan_moe_lb.balancing.router import LoadBalancedRouter


class GradientNorms:
    """Replacement of the two router methods that attach losses."""

    def __init__(self, router: LoadBalancedRouter, record: StepRecord, index: int) -> None:
        """Replace ``attach_losses`` and ``gather`` of a router.

        The gradient of ``record.gradient_squares_N2`` accumulates the sums of the squared gradients
        of the model's loss and of the aux losses.
        """
        assert record.gradient_squares_N2 is not None
        self._router, self._record = router, record
        self._squares_2 = record.gradient_squares_N2[index]
        self._attach, self._gather = router.attach_losses, router.gather
        router.attach_losses, router.gather = self.attach_losses, self.gather  # type: ignore[method-assign]

    def attach_losses(self, logits_BLE: torch.Tensor, tokens: BatchTokens | None) -> torch.Tensor:
        """Attach the losses of logits as the router does, and measure the aux losses' gradient."""
        if self._record.measures:
            with untyped():
                local_BLE = _Measure.apply(local_shard(logits_BLE), self._squares_2[1])
            logits_BLE = placed_as(logits_BLE, local_BLE)
        return self._attach(logits_BLE, tokens)

    def gather(
        self,
        logits_BLE: torch.Tensor,
        scores_BLE: torch.Tensor,
        ids_BLK: torch.Tensor,
        coefficients_BE: torch.Tensor | None,
        *losses: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gather the local scores on the path of the model's loss, and measure its gradient.

        The losses of sums are attached on the path of the aux losses. An evaluation is not
        measured, nor is a step that is left out. Arguments and result are as in ``LoadBalancedRouter.gather``.
        """
        if not (self._router.training and self._record.measures):
            return self._gather(logits_BLE, scores_BLE, ids_BLK, coefficients_BE, *losses)
        score = SCORE_FUNCTIONS[self._router.score_func]
        main_BLE = score(_Measure.apply(local_shard(logits_BLE), self._squares_2[0]))
        chosen_BLK = main_BLE.gather(-1, ids_BLK)
        chosen_BLK = _AttachApart.apply(chosen_BLK, scores_BLE, coefficients_BE, *losses)
        return main_BLE, chosen_BLK


class _Measure(torch.autograd.Function):
    """Return the logits; the backward adds their gradient's sum of squares to ``squares.grad``."""

    @staticmethod
    def forward(ctx, logits_BLE, squares):
        return logits_BLE.view_as(logits_BLE)

    @staticmethod
    def backward(ctx, grad_BLE):
        return grad_BLE, grad_BLE.float().square().sum()


class _AttachApart(torch.autograd.Function):
    """Return the chosen scores unchanged.

    Their gradient goes to the main path; ``scores_BLE`` gets only the gradient of the losses.
    """

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
