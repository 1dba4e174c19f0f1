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
