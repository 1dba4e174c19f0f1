"""How a loss reaches the router: by gradient, not by value.

The trainer's loss is untouched, so a router loss works on every pipeline stage,
under every schedule, and with the loss computed in chunks. The top-k scores are
gathered from the full scores anyway, and the backward of that gather writes a
tensor of the size of the scores. ``gather_scores`` starts that tensor from the
closed-form gradient of the losses instead of from zeros: the losses cost no
pass of their own, and nothing of the size of the scores is saved for them.
"""

from __future__ import annotations

import spmd_types as spmd
import torch
from spmd_types.runtime import get_local_type, get_partition_spec

from titan_moe_lb.losses.functional import load_balance_score_grad


@spmd.register_autograd_function
class _GatherScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        scores_BLE: torch.Tensor,
        topk_expert_ids_BLK: torch.Tensor,
        coefficients_BE: torch.Tensor,
        sums_to_one: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(scores_BLE, topk_expert_ids_BLK, coefficients_BE)
        ctx.sums_to_one = sums_to_one
        return scores_BLE.gather(dim=-1, index=topk_expert_ids_BLK)

    @staticmethod
    def backward(ctx, grad_BLK: torch.Tensor):
        scores_BLE, topk_expert_ids_BLK, coefficients_BE = ctx.saved_tensors
        # contiguous() materialises the expanded view; a dense gradient is not copied.
        grad_BLE = load_balance_score_grad(
            scores_BLE, coefficients_BE, sums_to_one=ctx.sums_to_one
        ).contiguous()
        return grad_BLE.scatter_add_(-1, topk_expert_ids_BLK, grad_BLK), None, None, None

    @staticmethod
    def typecheck_forward(
        scores_BLE: torch.Tensor,
        topk_expert_ids_BLK: torch.Tensor,
        coefficients_BE: torch.Tensor,
        sums_to_one: bool,
    ) -> torch.Tensor:
        """SPMD type: the gathered scores are sharded as the scores are."""
        with spmd.no_typecheck():
            gathered_BLK = _GatherScores.apply(
                scores_BLE, topk_expert_ids_BLK, coefficients_BE, sums_to_one
            )
        spmd.assert_type(gathered_BLK, get_local_type(scores_BLE), get_partition_spec(scores_BLE))
        return gathered_BLK


def gather_scores(
    scores_BLE: torch.Tensor,
    topk_expert_ids_BLK: torch.Tensor,
    coefficients_BE: torch.Tensor,
    *,
    sums_to_one: bool,
) -> torch.Tensor:
    """The scores of the selected experts, with the gradient of router losses attached.

    Forward is ``scores_BLE.gather(-1, topk_expert_ids_BLK)``, bit for bit. Backward
    adds the gradient of ``sum_be coefficients[b,e] * sum_l p(b,l,e)``.

    Args:
        scores_BLE: scores after the score function ``(B, L, E)``.
        topk_expert_ids_BLK: selected experts ``(B, L, K)``, int64, distinct in a token.
        coefficients_BE: ``(B, E)`` or ``(1, E)``, float32, see
            :func:`titan_moe_lb.losses.functional.load_balance_score_grad`.
        sums_to_one: the score function is a softmax.

    Returns:
        ``(B, L, K)`` in the dtype of the scores.
    """
    return _GatherScores.apply(scores_BLE, topk_expert_ids_BLK, coefficients_BE, sums_to_one)


@spmd.register_autograd_function
class _ScoresWithZLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, logits_BLE: torch.Tensor, coefficient: float, softmax: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if softmax:
            scores_BLE = torch.softmax(logits_BLE, dim=-1)
            # The largest score is exp(largest logit - logsumexp), and at least 1/E: two
            # maxima are cheaper than a second pass of exponentials, and as exact.
            logsumexp_BL = logits_BLE.amax(dim=-1).float() - scores_BLE.amax(dim=-1).float().log()
        else:
            scores_BLE = torch.sigmoid(logits_BLE)
            logsumexp_BL = torch.logsumexp(logits_BLE.float(), dim=-1)
        # A softmax is its own saved tensor, as upstream. A sigmoid saturates, so
        # softmax(logits) cannot be had from it: there the logits are kept as well.
        ctx.save_for_backward(scores_BLE, logsumexp_BL, None if softmax else logits_BLE)
        ctx.coefficient = coefficient
        ctx.mark_non_differentiable(logsumexp_BL)
        return scores_BLE, logsumexp_BL

    @staticmethod
    def backward(ctx, grad_BLE: torch.Tensor, _grad_BL: torch.Tensor):
        scores_BLE, logsumexp_BL, logits_BLE = ctx.saved_tensors
        factor_BL1 = (2 * ctx.coefficient * logsumexp_BL).unsqueeze(-1).to(scores_BLE.dtype)
        if logits_BLE is None:
            # A constant added to the gradient of a softmax's output vanishes in its
            # backward, so the term is added behind it.
            softmax_BLE = scores_BLE
            grad_BLE = torch._softmax_backward_data(grad_BLE, scores_BLE, -1, scores_BLE.dtype)
        else:
            softmax_BLE = torch.exp(logits_BLE - logsumexp_BL.unsqueeze(-1)).to(scores_BLE.dtype)
            grad_BLE = torch.ops.aten.sigmoid_backward(grad_BLE, scores_BLE)
        return grad_BLE.addcmul_(softmax_BLE, factor_BL1), None, None

    @staticmethod
    def typecheck_forward(
        logits_BLE: torch.Tensor, coefficient: float, softmax: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """SPMD type: the scores are sharded as the logits are."""
        with spmd.no_typecheck():
            scores_BLE, logsumexp_BL = _ScoresWithZLoss.apply(logits_BLE, coefficient, softmax)
        spmd.assert_type(scores_BLE, get_local_type(logits_BLE), get_partition_spec(logits_BLE))
        return scores_BLE, logsumexp_BL


def scores_with_z_loss(
    logits_BLE: torch.Tensor, coefficient: float, *, softmax: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scores of the logits, with the gradient of the router z-loss attached.

    Forward is the softmax (or sigmoid) of the logits, bit for bit. Backward adds the
    gradient of ``coefficient * sum_t logsumexp(t)**2``, which in the logits is
    ``2 * coefficient * logsumexp(t) * softmax(logits)(t)``.

    Args:
        logits_BLE: gate outputs ``(B, L, E)``.
        coefficient: weight of one token.
        softmax: the score function is a softmax, else a sigmoid.

    Returns:
        Scores ``(B, L, E)`` in the dtype of the logits, and the logsumexp of the
        logits ``(B, L)``, float32, not differentiable.
    """
    return _ScoresWithZLoss.apply(logits_BLE, coefficient, softmax)
