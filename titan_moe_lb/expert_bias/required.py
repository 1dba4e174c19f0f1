"""The bias that a token requires of an expert. Torch alone.

Shape suffixes: B = rows, L = local tokens of a row, E = experts, G = groups, N = experts of a
group, K = top_k.
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
    """The bias above which a token selects an expert, where the others are as they are.

    Without groups ``r(t,i) = alpha(t) - s(t,i)`` with alpha the (K+1)-th largest biased
    score (Kimi K3 technical report, Eq. 13): the K selected experts are those whose bias is
    above what is required of it. Under group-limited routing an expert needs its group to be
    selected as well: the sum of the two best biased scores of the group has to reach that of
    the best group that is left out, or of the worst one that it would replace.

    Args:
        scores_BLE: scores, float32.
        biased_BLE: scores plus bias, before a group limit.
        runner_up_BL1: alpha: the (K+1)-th largest of them, after the group limit; -inf
            where a token selects all that it can reach.
        num_groups, num_limited_groups: of group-limited routing; None without.

    Returns:
        float32 ``(B, L, E)``.
    """
    needed = runner_up_BL1
    if num_groups is not None and num_limited_groups != num_groups:
        by_group_BLE = _needed_by_group(biased_BLE, num_groups, num_limited_groups)
        needed = torch.maximum(runner_up_BL1, by_group_BLE)
    return needed - scores_BLE


def _needed_by_group(biased_BLE: torch.Tensor, groups: int, limit: int | None) -> torch.Tensor:
    """Biased score with which an expert's group is selected; -inf where it is without it."""
    assert limit is not None
    biased_BLGN = biased_BLE.unflatten(-1, (groups, -1))
    best_BLG3 = biased_BLGN.topk(min(3, biased_BLGN.shape[-1]), dim=-1).values
    if best_BLG3.shape[-1] == 2:
        best_BLG3 = torch.nn.functional.pad(best_BLG3, (0, 1), value=-torch.inf)
    first, second, third = best_BLG3.split(1, dim=-1)
    sum_BLG1 = first + second
    ranked = sum_BLG1.topk(limit + 1, dim=-2).values
    worst_in, best_out = ranked[..., -2:-1, :], ranked[..., -1:, :]
    to_reach_BLG1 = torch.where(sum_BLG1 >= worst_in, best_out, worst_in)
    best_other = torch.where(biased_BLGN >= first, second, first)
    next_other = torch.where(biased_BLGN >= second, third, second)
    needed = torch.where(
        best_other + next_other >= to_reach_BLG1, -torch.inf, to_reach_BLG1 - best_other
    )
    return needed.flatten(-2)
