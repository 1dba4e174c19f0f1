"""Choice of the experts of each token."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import torch

from titan_moe_lb.balancing.expert_bias.required import required_bias
from titan_moe_lb.balancing.recording.recomputation import is_recomputation
from titan_moe_lb.balancing.recording.score_sums import Choice
from titan_moe_lb.balancing.valid_tokens.batch_tokens import BatchTokens

if TYPE_CHECKING:
    from titan_moe_lb.balancing.router import LoadBalancedRouter


def choose(
    router: LoadBalancedRouter,
    scores_BLE: torch.Tensor,
    expert_bias_E: torch.Tensor | None,
    tokens: BatchTokens | None,
    learns: bool,
) -> Choice:
    """Choose the experts of every token.

    A forced strategy chooses, or torchtitan's debug routing, or else the top-k of the biased
    scores. A replay then replaces the choice by the experts of an earlier forward.
    """
    if router.forced_routing is not None:
        assert router.record is not None, "forced routing needs a wired router"
        number = router.record.forward_number()
        ids_BLK = router.forced_routing(scores_BLE, number, partial(limit_groups, router))
        chosen = Choice(ids_BLK, ids_BLK)
    elif router._debug_force_load_balance:
        ids_BLK = router._debug_force_load_balance_routing(scores_BLE)[0]
        chosen = Choice(ids_BLK, ids_BLK)
    else:
        chosen = _top_k(router, scores_BLE, expert_bias_E, tokens, learns)
    if router.replay is None:
        return chosen
    return chosen._replace(expert_ids_BLK=router.replay(chosen.expert_ids_BLK))


def _top_k(
    router: LoadBalancedRouter,
    scores_BLE: torch.Tensor,
    expert_bias_E: torch.Tensor | None,
    tokens: BatchTokens | None,
    learns: bool,
) -> Choice:
    """Select the top-k of the biased scores.

    A bias rule with a histogram and sums of the scores also observe the (K+1)-th score.
    """
    biased_BLE = scores_BLE if expert_bias_E is None else scores_BLE + expert_bias_E
    choice_BLE = limit_groups(router, biased_BLE)
    record, rule = router.record, router.expert_bias
    histogram_EH = None if record is None else record.histogram_EH
    has_next = router.top_k < open_experts(router)
    observed = histogram_EH is not None or (has_next and records_scores(router))
    if not (observed and learns) or is_recomputation():
        ids_BLK = choice_BLE.topk(router.top_k, dim=-1, sorted=False).indices
        return Choice(ids_BLK, ids_BLK)
    assert record is not None
    best_BLK1, ids_BLK1 = choice_BLE.topk(router.top_k + 1, dim=-1)
    if histogram_EH is not None:
        assert rule is not None and expert_bias_E is not None
        required_BLE = required_bias(
            scores_BLE,
            biased_BLE,
            best_BLK1[..., -1:],
            num_groups=router.num_expert_groups,
            num_limited_groups=router.num_limited_groups,
        )
        number = record.one if tokens is None else tokens.valid_BL.unsqueeze(-1)
        rule.observe(histogram_EH, required_BLE, expert_bias_E, number.int())
    ids_BLK = ids_BLK1[..., : router.top_k].contiguous()
    if not has_next:
        return Choice(ids_BLK, ids_BLK)
    groups_BL1 = None
    if records_scores(router):
        groups_BL1 = _group_margin(router, biased_BLE, best_BLK1[..., -2:-1])
    return Choice(ids_BLK, ids_BLK1, best_BLK1, groups_BL1)


def records_scores(router: LoadBalancedRouter) -> bool:
    """Return True if the running step records the sums of the scores."""
    return router.step_record is not None and router.step_record.records_scores


def is_forced(router: LoadBalancedRouter) -> bool:
    """Return True if another than the scores chooses the experts."""
    return router.forced_routing is not None or router._debug_force_load_balance


def open_experts(router: LoadBalancedRouter) -> int:
    """Return the number of experts from which a token chooses, after the group limit."""
    if router.num_expert_groups is None or router.num_limited_groups is None:
        return router.num_experts
    return router.num_experts // router.num_expert_groups * router.num_limited_groups


def limit_groups(router: LoadBalancedRouter, choice_BLE: torch.Tensor) -> torch.Tensor:
    """Mask the scores ``(B, L, E)`` of the expert groups that a token cannot reach."""
    if router.num_expert_groups is None:
        return choice_BLE
    return router._get_node_limited_routing_scores(choice_BLE)


def _group_margin(
    router: LoadBalancedRouter, biased_BLE: torch.Tensor, last_BL1: torch.Tensor
) -> torch.Tensor | None:
    """Compute the margin of the last open group over the next one ``(B, L, 1)``.

    A group's score sums its two best experts, as torchtitan's. The difference of two groups has
    the noise of four scores, that of two experts the noise of two: hence the root of 1/2. An
    exchange of the groups changes nothing while both are worse than the last chosen expert.

    Args:
        router: router of the choice.
        biased_BLE: selection scores before the group limit.
        last_BL1: selection score of the last chosen expert.

    Returns:
        None if a token reaches every group.
    """
    number, limited = router.num_expert_groups, router.num_limited_groups
    if number is None or limited is None or limited == number:
        return None
    two_BLG2 = biased_BLE.unflatten(-1, (number, -1)).topk(2, dim=-1).values
    scores_BLM1, groups_BLM1 = two_BLG2.sum(dim=-1).topk(limited + 1, dim=-1)
    margin_BL1 = (scores_BLM1[..., -2:-1] - scores_BLM1[..., -1:]) * math.sqrt(0.5)
    best_BL1 = two_BLG2[..., 0].gather(-1, groups_BLM1[..., -2:]).amax(dim=-1, keepdim=True)
    return torch.maximum(margin_BL1, last_BL1 - best_BL1)


def unbiased(
    router: LoadBalancedRouter,
    scores_BLE: torch.Tensor,
    expert_bias_E: torch.Tensor | None,
    ids_BLK: torch.Tensor,
) -> torch.Tensor:
    """Select the top-k of the scores without expert bias and group limit.

    If the router uses neither of them and no forced routing, the chosen experts are returned.
    """
    if is_forced(router) or expert_bias_E is not None or router.num_expert_groups is not None:
        return scores_BLE.topk(router.top_k, dim=-1, sorted=False).indices
    return ids_BLK
