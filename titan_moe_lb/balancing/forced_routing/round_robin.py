"""Exact balance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from titan_moe_lb.balancing.forced_routing.functional import round_robin_ids
from titan_moe_lb.balancing.forced_routing.token_index import TokenIndexRouting


class RoundRobin(TokenIndexRouting):
    """Send every expert the same number of tokens of every dispatch, to within one.

    The same holds for every EP rank: successive experts are on different ranks, and no rank is idle
    if there are at least as many choices as ranks. (In the order of the experts, all first tokens
    would go to the first ranks: vllm-project/afd-plugin issue 156, sgl-project/sglang PR 37741.) If
    the model limits expert groups, a token selects runs of successive experts, and the ranks are
    equal to within one run. Source: W0 of Megatron-LM PR 7488.
    """

    type_name: ClassVar[str] = "round_robin"

    @dataclass(kw_only=True, slots=True)
    class Config(TokenIndexRouting.Config):
        """Settings of ``round_robin``."""

        def expert_lists(self) -> dict[str, list[int]]:
            """List all experts in an even order."""
            return {"order": self.even_order()}

    order: torch.Tensor

    def deal(self, tokens_T, total_tokens, step) -> torch.Tensor:
        """Assign the experts in turn, in the even order."""
        return self.order[round_robin_ids(tokens_T, self.top_k, self.num_experts)]
