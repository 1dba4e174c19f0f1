"""How a loss reaches the router: by gradient, not by value.

The trainer's loss is untouched, so a router loss works on every pipeline stage,
under every schedule, and with the loss computed in chunks. The top-k scores are
gathered from the full scores anyway, and the backward of that gather writes a
tensor of the size of the scores. ``gather_scores`` starts that tensor from the
closed-form gradient of the losses instead of from zeros: the losses of sums cost no
pass of their own, and nothing of the size of the scores is saved for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import spmd_types as spmd
import torch
from spmd_types.runtime import get_local_type, get_partition_spec

from titan_moe_lb.functional import at_least_float32, load_balance_score_grad

if TYPE_CHECKING:
    from titan_moe_lb.balancing.losses.base import LogitsLoss


def gather_scores(
    scores_BLE: torch.Tensor,
    topk_expert_ids_BLK: torch.Tensor,
    coefficients_BE: torch.Tensor,
    inverse_sums_BL: torch.Tensor | None,
    document_BL: torch.Tensor | None = None,
) -> torch.Tensor:
    """The scores of the selected experts, with the gradient of router losses attached.

    Forward is ``scores_BLE.gather(-1, topk_expert_ids_BLK)``, bit for bit. Backward
    adds the gradient of ``sum_be coefficients[b,e] * sum_l p(b,l,e)``.

    Args:
        scores_BLE: scores after the score function ``(B, L, E)``.
        topk_expert_ids_BLK: selected experts ``(B, L, K)``, int64, distinct in a token.
        coefficients_BE: ``(B, E)``, ``(1, E)`` or ``(B, D, E)``, float32, see
            :func:`titan_moe_lb.functional.load_balance_score_grad`.
        inverse_sums_BL: 1 / sum_j s(t,j) ``(B, L)``, 0 for padding; None where all scores
            sum to one, as those of a softmax, and there is no padding.
        document_BL: number of each token's document, where documents have coefficients.

    Returns:
        ``(B, L, K)`` in the dtype of the scores.
    """
    return _GatherScores.apply(
        scores_BLE, topk_expert_ids_BLK, coefficients_BE, inverse_sums_BL, document_BL
    )


def gradient_of_sums(
    scores_BLE: torch.Tensor,
    coefficients_BE: torch.Tensor,
    inverse_sums_BL: torch.Tensor | None,
    document_BL: torch.Tensor | None,
) -> torch.Tensor:
    """The gradient that :func:`gather_scores` attaches ``(B, L, E)``, to be written to."""
    # contiguous() materialises the expanded view; a dense gradient is not copied.
    return load_balance_score_grad(
        scores_BLE,
        coefficients_BE,
        sums_to_one=inverse_sums_BL is None,
        inverse_sums_BL=inverse_sums_BL,
        document_BL=document_BL,
    ).contiguous()


@spmd.register_autograd_function
class _GatherScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, scores_BLE, topk_expert_ids_BLK, coefficients_BE, inverse_sums_BL, document_BL
    ):
        ctx.save_for_backward(
            scores_BLE, topk_expert_ids_BLK, coefficients_BE, inverse_sums_BL, document_BL
        )
        return scores_BLE.gather(dim=-1, index=topk_expert_ids_BLK)

    @staticmethod
    def backward(ctx, grad_BLK: torch.Tensor):
        scores_BLE, topk_expert_ids_BLK, coefficients_BE, inverse_sums_BL, document_BL = (
            ctx.saved_tensors
        )
        grad_BLE = gradient_of_sums(scores_BLE, coefficients_BE, inverse_sums_BL, document_BL)
        return grad_BLE.scatter_add_(-1, topk_expert_ids_BLK, grad_BLK), None, None, None, None

    @staticmethod
    def typecheck_forward(scores_BLE, *others):
        """SPMD type: the gathered scores are sharded as the scores are."""
        return _typed_as(scores_BLE, _GatherScores, scores_BLE, *others)


def attach_to_logits(
    logits_BLE: torch.Tensor,
    loss: LogitsLoss,
    saved: torch.Tensor | None,
    weight: torch.Tensor,
    share: float | torch.Tensor,
) -> torch.Tensor:
    """The logits, with the gradient of a loss of each token attached.

    Forward is the logits themselves. Backward adds the gradient of
    ``weight * (share * loss.per_token(logits)).sum()``. The logits are kept for it.

    Args:
        logits_BLE: gate outputs ``(B, L, E)``.
        saved: of ``loss.per_token_and_saved(logits)``.
        weight: float32 ``()``, on the device.
        share: of a token in its row: a number where all are alike,
            else float32 ``(B, L)``.
    """
    if isinstance(share, torch.Tensor):
        return _AttachToLogits.apply(logits_BLE, saved, weight * share.unsqueeze(-1), loss, 1.0)
    return _AttachToLogits.apply(logits_BLE, saved, weight, loss, share)


@spmd.register_autograd_function
class _AttachToLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_BLE, saved, weight, loss, scale):
        ctx.save_for_backward(logits_BLE, saved, weight)
        ctx.loss, ctx.scale = loss, scale
        return logits_BLE.view_as(logits_BLE)

    @staticmethod
    def backward(ctx, grad_BLE: torch.Tensor):
        logits_BLE, saved, weight = ctx.saved_tensors
        wide_BLE = at_least_float32(logits_BLE)
        gradient_BLE = ctx.loss.logits_gradient(wide_BLE, saved).to(grad_BLE.dtype)
        weight = weight.to(grad_BLE.dtype)
        grad_BLE = torch.addcmul(grad_BLE, gradient_BLE, weight, value=ctx.scale)
        return grad_BLE, None, None, None, None

    @staticmethod
    def typecheck_forward(logits_BLE, *others):
        """SPMD type: that of the logits."""
        return _typed_as(logits_BLE, _AttachToLogits, logits_BLE, *others)


def _typed_as(reference: torch.Tensor, function: type[torch.autograd.Function], *arguments):
    with spmd.no_typecheck():
        result = function.apply(*arguments)
    spmd.assert_type(result, get_local_type(reference), get_partition_spec(reference))
    return result
