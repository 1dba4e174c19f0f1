"""Mathematics of the router losses, on plain tensors. Imports torch alone.

Shape suffixes: B = sequences, L = tokens of a sequence, E = experts, K = top_k,
T = tokens that one loss averages over.

Notation of the formulas: s(t,i) is the score of token t for expert i after the
score function, p(t,i) = s(t,i) / sum_j s(t,j) its share of the token, and

    f_i = E / (K T) * #{t : i in TopK(t)}      (not differentiated)
    P_i = 1 / T * sum_t p(t,i)
    L   = sum_i f_i P_i                        (1.0 at perfect balance)

All functions take scores of any floating dtype and compute in float32 or wider. Probabilities
and gradients are exact as long as S(t) = sum_j s(t,j) is at least 2 / max of that dtype, which is
6e-39 in float32. Below this bound p shrinks to 0 with S, and gradients stay finite. A mean over
no tokens is 0.
"""

from __future__ import annotations

import torch

UNDERFLOW = 2.0**60
"""Factor that keeps products of the smallest scores with the weight of a loss above 0."""


def count_tokens_per_expert(topk_expert_ids_BLK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Count the tokens of each sequence that selected each expert.

    Args:
        topk_expert_ids_BLK: integer expert ids ``(B, L, K)``, distinct within a token.
        num_experts: E.

    Returns:
        ``(B, E)``, int64.
    """
    counts_BE = topk_expert_ids_BLK.new_zeros(topk_expert_ids_BLK.shape[0], num_experts)
    return add_tokens_(counts_BE, topk_expert_ids_BLK, counts_BE.new_ones(()))


def add_tokens_(
    counts_BE: torch.Tensor, topk_expert_ids_BLK: torch.Tensor, number: torch.Tensor
) -> torch.Tensor:
    """Add the tokens of :func:`count_tokens_per_expert` to counts, in place.

    Args:
        counts_BE: counts ``(B, E)``, int64.
        topk_expert_ids_BLK: integer expert ids ``(B, L, K)``, distinct within a token.
        number: addend for each token, int64 ``(B, L, 1)``, or 1 for all as ``()``.

    Returns:
        The counts.
    """
    number_BN = number.expand_as(topk_expert_ids_BLK).flatten(1)
    return counts_BE.scatter_add_(1, topk_expert_ids_BLK.flatten(1), number_BN)


def expert_load(counts: torch.Tensor, top_k: int, num_tokens: int) -> torch.Tensor:
    """Compute f of the module docstring: each expert's load in units of the balanced load.

    Args:
        counts: tokens per expert ``(..., E)``.
        top_k: K.
        num_tokens: T, the tokens that were counted (each counts for K experts).

    Returns:
        ``(..., E)``, mean 1 over the experts.
    """
    return counts * (counts.shape[-1] / max(top_k * num_tokens, 1))


def inverse_sums(scores_BLE: torch.Tensor) -> torch.Tensor:
    """Compute 1 / sum_j s(t,j) of each token ``(B, L)``, float32 or wider.

    The result is at most half of the dtype's largest number.
    """
    sums_BL = at_least_float32(scores_BLE).sum(dim=-1)
    return sums_BL.reciprocal().clamp(max=torch.finfo(sums_BL.dtype).max / 2)


def probability_sums(
    scores_BLE: torch.Tensor,
    *,
    sums_to_one: bool = False,
    inverse_sums_BL: torch.Tensor | None = None,
    document_BL: torch.Tensor | None = None,
    num_documents: int = 1,
) -> torch.Tensor:
    """Compute sum_t p(t,i) of each sequence.

    Args:
        scores_BLE: positive scores ``(B, L, E)``.
        sums_to_one: True if the scores of a token sum to one by construction, so that p = s.
        inverse_sums_BL: result of :func:`inverse_sums`, if it is known; 0 leaves a token out.
        document_BL: number of each token's document in its row, int64. With it, the
            ``num_documents`` documents of a row are its sequences.
        num_documents: documents of a row.

    Returns:
        ``(B, E)``, or ``(B num_documents, E)``; divide by the tokens of a sequence for P.
    """
    scores_BLE = at_least_float32(scores_BLE)
    if document_BL is not None:
        weights_BL = torch.ones_like(scores_BLE[..., 0])
        if not sums_to_one:
            weights_BL = inverse_sums(scores_BLE) if inverse_sums_BL is None else inverse_sums_BL
        documents_D1 = torch.arange(num_documents, device=document_BL.device).unsqueeze(1)
        weights_BDL = (document_BL.unsqueeze(1) == documents_D1) * weights_BL.unsqueeze(1)
        return (weights_BDL @ scores_BLE).flatten(0, 1)
    if sums_to_one:
        return scores_BLE.sum(dim=1)
    # A matrix product with 1/S as its left side sums and normalizes in one pass
    # over the scores, without a second tensor of their size.
    if inverse_sums_BL is None:
        inverse_sums_BL = inverse_sums(scores_BLE)
    return torch.bmm(inverse_sums_BL.unsqueeze(1), scores_BLE).squeeze(1)


def sequence_wise_load_balance(
    scores_BLE: torch.Tensor, topk_expert_ids_BLK: torch.Tensor
) -> torch.Tensor:
    """Compute the sequence-wise balance loss of DeepSeek-V3, averaged over the sequences.

    Source: arXiv 2412.19437, Eqs. 17 to 20 (without the factor alpha): T is one
    sequence. Eq. 18 counts the top-K of the unbiased scores. Pass those ids for
    the paper's form, or the dispatched ids to count the selected experts.

    Args:
        scores_BLE: scores after the score function ``(B, L, E)``.
        topk_expert_ids_BLK: counted expert ids ``(B, L, K)``, int64.

    Returns:
        Scalar, differentiable in the scores.
    """
    length, num_experts = scores_BLE.shape[1:]
    counts_BE = count_tokens_per_expert(topk_expert_ids_BLK, num_experts)
    sums_BE = _ProbabilitySums.apply(scores_BLE)
    load_BE = expert_load(counts_BE.to(sums_BE.dtype), topk_expert_ids_BLK.shape[-1], length)
    return (load_BE * sums_BE).sum() / _at_least_one(scores_BLE.shape[0] * length)


def batch_wise_load_balance(
    scores_BLE: torch.Tensor, topk_expert_ids_BLK: torch.Tensor
) -> torch.Tensor:
    """Compute the load-balancing loss of Switch Transformer over all tokens passed in.

    Source: arXiv 2101.03961, Eqs. 4 to 6, generalized to K experts a token (the
    "micro-batch LBL" of arXiv 2501.11873): T = B * L.

    Args:
        scores_BLE: scores after the score function ``(B, L, E)``.
        topk_expert_ids_BLK: counted expert ids ``(B, L, K)``, int64.

    Returns:
        Scalar, differentiable in the scores.
    """
    counts_BE = count_tokens_per_expert(topk_expert_ids_BLK, scores_BLE.shape[-1])
    num_routed_tokens = topk_expert_ids_BLK.numel()
    return load_balance_from_counts(scores_BLE, counts_BE.sum(dim=0), num_routed_tokens)


def load_balance_from_counts(
    scores_BLE: torch.Tensor, counts_E: torch.Tensor, num_routed_tokens: int | torch.Tensor
) -> torch.Tensor:
    """Compute the balance loss from given counts.

    Source: arXiv 2501.11873, Eq. 3: f from the tokens of the global batch, P from
    the tokens at hand.

    Args:
        scores_BLE: scores after the score function ``(B, L, E)``.
        counts_E: tokens per expert ``(E,)`` of any batch.
        num_routed_tokens: K times the tokens that were counted.

    Returns:
        Scalar, differentiable in the scores.
    """
    num_sequences, length, num_experts = scores_BLE.shape
    sums_E = _ProbabilitySums.apply(scores_BLE).sum(dim=0)
    load_E = counts_E.to(sums_E.dtype) * (num_experts / _at_least_one(num_routed_tokens))
    return (load_E * sums_E).sum() / _at_least_one(num_sequences * length)


def router_z_loss(logits_BLE: torch.Tensor) -> torch.Tensor:
    """Compute mean_t logsumexp_i(logits(t,i))**2.

    Source: ST-MoE, arXiv 2202.08906, Eq. 5.

    Args:
        logits_BLE: gate outputs before the score function ``(B, L, E)``.

    Returns:
        Scalar, differentiable in the logits.
    """
    logsumexp_BL = torch.logsumexp(at_least_float32(logits_BLE), dim=-1)
    return logsumexp_BL.square().sum() / _at_least_one(logsumexp_BL.numel())


def load_balance_score_grad(
    scores_BLE: torch.Tensor,
    coefficients_BE: torch.Tensor,
    *,
    sums_to_one: bool,
    inverse_sums_BL: torch.Tensor | None = None,
    document_BL: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the gradient of ``sum_be coefficients[b,e] * sum_l p(b,l,e)`` in the scores.

    Every loss that is a function of the probability sums has a gradient of this form; the
    coefficients are its gradient in the sums. With S(t) = sum_j s(t,j),

        d/ds(t,j) = (coefficients_j - sum_i coefficients_i p(t,i)) / S(t)

    For scores that sum to one (softmax) p = s, and the gradient is ``coefficients_j``: the same
    vector for every token of a sequence. Both forms have the same gradient in the logits of a
    softmax.

    Args:
        scores_BLE: ``(B, L, E)``.
        coefficients_BE: ``(B, E)``, or ``(1, E)`` if all sequences share them;
            ``(B, D, E)`` if documents have their own.
        sums_to_one: True if the scores of a token sum to one by construction.
        inverse_sums_BL: 1 / S(t) ``(B, L)``, if it is known; 0 leaves a token out.
        document_BL: number of each token's document in its row, int64, below D.

    Returns:
        ``(B, L, E)`` in the dtype of the scores. With ``sums_to_one`` it can be an expanded
        view: do not write to it.
    """
    wide_BLE = at_least_float32(scores_BLE)
    if document_BL is not None:
        ids_BLE = document_BL.unsqueeze(-1).expand_as(scores_BLE)
        coefficients_BLE = coefficients_BE.to(wide_BLE.dtype).gather(1, ids_BLE)
        if sums_to_one:
            return coefficients_BLE.to(scores_BLE.dtype)
        inverse_BL = inverse_sums(scores_BLE) if inverse_sums_BL is None else inverse_sums_BL
        inverse_BL1 = inverse_BL.unsqueeze(-1)
        mean_BL1 = (wide_BLE * inverse_BL1 * coefficients_BLE).sum(dim=-1, keepdim=True)
        return ((coefficients_BLE - mean_BL1) * inverse_BL1).to(scores_BLE.dtype)
    coefficients_BE = coefficients_BE.to(wide_BLE.dtype)
    if sums_to_one:
        return coefficients_BE.unsqueeze(1).to(scores_BLE.dtype).expand_as(scores_BLE)
    if inverse_sums_BL is None:
        inverse_sums_BL = inverse_sums(scores_BLE)
    inverse_BL1 = inverse_sums_BL.unsqueeze(-1)
    scaled_BE1 = (coefficients_BE * UNDERFLOW).unsqueeze(-1).expand(len(scores_BLE), -1, -1)
    dot_BL1 = torch.bmm(wide_BLE, scaled_BE1)
    grad_BLE = torch.addcmul(
        coefficients_BE.unsqueeze(1), dot_BL1, inverse_BL1, value=-1 / UNDERFLOW
    )
    return grad_BLE.mul_(inverse_BL1).to(scores_BLE.dtype)


def gather_scores(
    scores_BLE: torch.Tensor,
    topk_expert_ids_BLK: torch.Tensor,
    coefficients_BE: torch.Tensor,
    inverse_sums_BL: torch.Tensor | None,
    document_BL: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gather the scores of the selected experts, and attach the gradient of balance losses.

    The forward equals ``scores_BLE.gather(-1, topk_expert_ids_BLK)`` bit for bit. The backward
    computes the gradient of ``sum_be coefficients[b,e] * sum_l p(b,l,e)`` and adds the gradient of
    the gather to it in place. The losses therefore need no extra pass over the scores.

    Args:
        scores_BLE: scores after the score function ``(B, L, E)``.
        topk_expert_ids_BLK: selected experts ``(B, L, K)``, int64, distinct in a token.
        coefficients_BE: see :func:`load_balance_score_grad`.
        inverse_sums_BL: see there; None if the scores of every token sum to one.
        document_BL: see there.

    Returns:
        ``(B, L, K)`` in the dtype of the scores.
    """
    return _GatherScores.apply(
        scores_BLE, topk_expert_ids_BLK, coefficients_BE, inverse_sums_BL, document_BL
    )


class _GatherScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores_BLE, ids_BLK, coefficients_BE, inverse_sums_BL, document_BL):
        ctx.save_for_backward(scores_BLE, ids_BLK, coefficients_BE, inverse_sums_BL, document_BL)
        return scores_BLE.gather(dim=-1, index=ids_BLK)

    @staticmethod
    def backward(ctx, grad_BLK: torch.Tensor):
        scores_BLE, ids_BLK, *losses = ctx.saved_tensors
        if torch.compiler.is_compiling():
            # A compiler fuses these comparisons with their neighbors; a scatter needs two passes more.
            experts_E = torch.arange(scores_BLE.shape[-1], device=scores_BLE.device)
            chosen_BLKE = ids_BLK.unsqueeze(-1) == experts_E
            gathered_BLE = torch.where(chosen_BLKE, grad_BLK.unsqueeze(-1), 0).sum(dim=-2)
            return gathered_BLE + attached_gradient(scores_BLE, *losses), *[None] * 4
        grad_BLE = attached_gradient(scores_BLE, *losses)
        return grad_BLE.scatter_add_(-1, ids_BLK, grad_BLK), *[None] * 4


def attached_gradient(
    scores_BLE: torch.Tensor,
    coefficients_BE: torch.Tensor,
    inverse_sums_BL: torch.Tensor | None,
    document_BL: torch.Tensor | None,
) -> torch.Tensor:
    """Compute the gradient that :func:`gather_scores` attaches, ``(B, L, E)``, contiguous."""
    # contiguous() materializes the expanded view; a dense gradient is not copied.
    return load_balance_score_grad(
        scores_BLE,
        coefficients_BE,
        sums_to_one=inverse_sums_BL is None,
        inverse_sums_BL=inverse_sums_BL,
        document_BL=document_BL,
    ).contiguous()


class _ProbabilitySums(torch.autograd.Function):
    """Probability sums of scores that do not sum to one, differentiable in the scores.

    The backward is the closed form: autograd on 1 / S overflows at S = 5e-20 already.
    """

    @staticmethod
    def forward(scores_BLE: torch.Tensor) -> torch.Tensor:
        return probability_sums(scores_BLE)

    @staticmethod
    def setup_context(ctx, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, coefficients_BE: torch.Tensor) -> torch.Tensor:
        (scores_BLE,) = ctx.saved_tensors
        wide_BLE = at_least_float32(scores_BLE)
        grad_BLE = load_balance_score_grad(wide_BLE, coefficients_BE, sums_to_one=False)
        largest = torch.finfo(scores_BLE.dtype).max
        return grad_BLE.clamp(-largest, largest).to(scores_BLE.dtype)


def _at_least_one(number: int | torch.Tensor) -> int | torch.Tensor:
    return number.clamp_min(1) if isinstance(number, torch.Tensor) else max(number, 1)


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Convert half precision to float32; return other tensors as they are."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
