"""Model whose first MoE layer chooses experts by token id, as torchtitan#3634 writes its router."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torchtitan.config.override import derive
from torchtitan.models import deepseek_v3 as upstream
from torchtitan.models.common.moe import TokenChoiceTopKRouter
from torchtitan.protocols.model_spec import ModelSpec

from model_registry.deepseek_v3 import tiny
from titan_moe_lb.wiring.model_spec import balanced

VOCABULARY = 2048


class HashRouter(TokenChoiceTopKRouter):
    """Router with a table from token ids to experts; its MoE layer sets the ids."""

    @dataclass(kw_only=True, slots=True)
    class Config(TokenChoiceTopKRouter.Config):
        vocab_size: int
        n_hash_layers: int
        layer_id: int

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        ids = torch.arange(config.vocab_size)
        table = torch.stack([ids * 7 % config.num_experts, (ids * 7 + 3) % config.num_experts], -1)
        self.register_buffer("tid2eid", table)
        self.input_ids = None

    def forward(self, x_BLD, expert_bias_E=None):
        scores = self.gate(x_BLD).sigmoid()
        ids = self.tid2eid[self.input_ids]
        return scores.gather(-1, ids), ids, scores


def spec_with_hash_layer(**arguments: Any) -> ModelSpec:
    """A balanced spec whose layer 1 is a hash layer and whose layers 2 and 3 are not."""
    config = tiny("flex", "standard")
    for number in (1, 2):  # a class of both kinds
        moe = config.layers[number].moe
        moe.router = derive(
            moe.router,
            HashRouter.Config,
            vocab_size=VOCABULARY,
            n_hash_layers=2,
            layer_id=number,
        )
    spec = dataclasses.replace(upstream.model_registry("debugmodel"), model=config)
    return balanced(spec, **arguments)
