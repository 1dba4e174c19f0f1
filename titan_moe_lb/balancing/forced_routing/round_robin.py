"""Exact balance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from titan_moe_lb.balancing.forced_routing.functional import round_robin_ids
from titan_moe_lb.balancing.forced_routing.token_index import TokenIndexRouting


class RoundRobin(TokenIndexRouting):
    """Gives every expert the same number of tokens of every dispatch, to within one.

    So it does every EP rank: it assigns experts rank by rank, and no rank is idle while there are
    as many choices as ranks. (Where experts are assigned in their own order, the first tokens all
    go to the first ranks: vllm-project/afd-plugin issue 156, sgl-project/sglang PR 37741.) Where
    the model limits expert groups, a token takes runs of successive experts, and the ranks are
    equal to within one run. W0 of Megatron-LM PR 7488.
    """

    type_name: ClassVar[str] = "round_robin"

    @dataclass(kw_only=True, slots=True)
    class Config(TokenIndexRouting.Config):
        def expert_lists(self) -> dict[str, list[int]]:
            return {"order": self.even_order()}

    order: torch.Tensor

    def deal(self, tokens_T, total_tokens, step) -> torch.Tensor:
        return self.order[round_robin_ids(tokens_T, self.top_k, self.num_experts)]
