"""Losses and bias rules as in their papers, in plain torch and numpy, without the package.

Shape suffixes: T = tokens of a sequence, E = experts, K = top_k, S = steps.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

NUM_GROUPS, GROUPS_PER_TOKEN = 4, 2
"""Device groups of the losses ``device_level`` and ``communication``."""
SCORES = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: F.softplus(logits).sqrt(),  # arXiv 2606.19348
}


def sequence_loss(
    kind: str,
    logits_TE: torch.Tensor | None,
    scores_TE: torch.Tensor,
    ids_TK: torch.Tensor,
    counts_E: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the loss of one sequence from its formula, for autograd.

    Args:
        logits_TE: logits, for the z-loss.
        ids_TK: experts that count for f.
        counts_E: tokens of each expert elsewhere, instead of ``ids_TK``.
    """
    num_tokens, num_experts = scores_TE.shape
    P_E = (scores_TE / scores_TE.sum(dim=-1, keepdim=True)).mean(dim=0)
    if kind == "z_loss":  # arXiv 2202.08906, Eq. 5
        return logits_TE.exp().sum(dim=-1).log().square().mean()
    if kind == "importance":  # arXiv 1701.06538, section 4
        return P_E.var(correction=0) / P_E.mean() ** 2
    if kind == "entropy":
        return math.log(num_experts) + (P_E * P_E.log()).sum()
    sent_TE = torch.zeros_like(scores_TE).scatter(-1, ids_TK, 1.0)
    counts_E = sent_TE.sum(dim=0) if counts_E is None else counts_E
    f_E = counts_E * num_experts / counts_E.sum()
    if kind == "device_level":  # arXiv 2405.04434, Eqs. 23 to 25
        return (f_E.view(NUM_GROUPS, -1).mean(dim=1) * P_E.view(NUM_GROUPS, -1).sum(dim=1)).sum()
    if kind == "communication":  # arXiv 2405.04434, Eqs. 26 to 28
        sent_G = sent_TE.view(num_tokens, NUM_GROUPS, -1).amax(dim=-1).sum(dim=0)
        f_G = sent_G * NUM_GROUPS / (GROUPS_PER_TOKEN * num_tokens)
        return (f_G * P_E.view(NUM_GROUPS, -1).sum(dim=1)).sum()
    assert kind in ("sequence_wise", "global_batch")  # arXiv 2412.19437, Eqs. 17 to 20; 2501.11873
    return (f_E * P_E).sum()


def mean_loss(
    kind: str,
    logits: torch.Tensor | None,
    scores: torch.Tensor,
    ids: torch.Tensor,
    counts_E: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the mean of :func:`sequence_loss` over the rows of ``(B, T, E)`` and ``(B, T,
    K)``."""
    rows = range(len(scores))
    losses = [
        sequence_loss(kind, None if logits is None else logits[b], scores[b], ids[b], counts_E)
        for b in rows
    ]
    return torch.stack(losses).mean()


def sequence_counts(ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Count the tokens of each sequence that selected each expert ``(B, E)``."""
    return F.one_hot(ids, num_experts).sum(dim=(1, 2)).float()


def sign_rule(counts_SE: np.ndarray, speed: float) -> np.ndarray:
    """Apply ``b_i += u (sign(mean n - n_i) - mean of the signs)`` over S steps, as torchtitan
    does."""
    signs_SE = np.sign(counts_SE.mean(axis=1, keepdims=True) - counts_SE)
    return speed * (signs_SE - signs_SE.mean(axis=1, keepdims=True)).sum(axis=0)
