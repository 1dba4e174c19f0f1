"""Bias that a token requires to select an expert. Torch alone.

Shape suffixes: B = rows, L = local tokens of a row, E = experts, G = groups, K = top_k.
"""

from __future__ import annotations

import torch


def required_bias(
    scores_BLE: torch.Tensor,
    biased_BLE: torch.Tensor,
    runner_up_BL1: torch.Tensor,
    *,
    num_groups: int | None,
    num_limited_groups: int | None,
) -> torch.Tensor:
    """Compute the bias above which a token selects an expert.

    Without groups ``r(t,i) = alpha(t) - s(t,i)``, where alpha is the (K+1)-th largest biased score
    (Kimi K3 technical report, Eq. 13). The K selected experts are those whose bias is above r.

    Under group-limited routing an expert's group must be selected too: the sum of the group's two
    best biased scores must exceed ``beta(t)``, the largest sum of a group that is left out. The
    experts of a group enter together, so all their biases rise by ``(beta - sum) / 2``. r is the
    larger of both requirements. If the selected groups have exactly K experts, only the requirement
    of the group remains.

    ``biased_BLE`` is before a group limit. ``runner_up_BL1`` is alpha, after the group limit; -inf
    if a token selects every expert that it can reach. Without groups both numbers are None.

    Returns:
        float32 ``(B, L, E)``.
    """
    needed = runner_up_BL1
    if num_groups is not None and num_limited_groups != num_groups:
        assert num_limited_groups is not None
        biased_BLGN = biased_BLE.unflatten(-1, (num_groups, -1))
        sum_BLG1 = biased_BLGN.topk(2, dim=-1).values.sum(dim=-1, keepdim=True)
        best_out = sum_BLG1.topk(num_limited_groups + 1, dim=-2).values[..., -1:, :]
        by_group_BLE = (biased_BLGN + (best_out - sum_BLG1) / 2).flatten(-2)
        needed = torch.maximum(runner_up_BL1, by_group_BLE)
    return needed - scores_BLE
