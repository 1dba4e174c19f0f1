"""Model whose first MoE layer chooses experts by token id, as torchtitan#3634 writes its router."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torchtitan.config import ParallelismConfig, TrainingConfig
from torchtitan.config.override import derive
from torchtitan.models import deepseek_v3 as upstream
from torchtitan.models.common.moe import TokenChoiceTopKRouter
from torchtitan.protocols.model_spec import ModelSpec

from model_registry.deepseek_v3 import tiny
from tests.support.own_loop_jobs import FLOAT32, forward
from titan_moe_lb.balancing.expert_bias import SignBias
from titan_moe_lb.balancing.losses import GlobalBatchAuxLoss
from titan_moe_lb.balancing.router import moe_layers_of, routers_of
from titan_moe_lb.own_loop.attach import attach
from titan_moe_lb.own_loop.build import build_model
from titan_moe_lb.parallel.local_shard import local_shard
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
        self.vocab_size = config.vocab_size
        self._init_self_buffers()
        self.input_ids = None

    def _init_self_buffers(self, *, buffer_device=None):
        ids = torch.arange(self.vocab_size, device=buffer_device)
        table = torch.stack([ids * 7 % self.num_experts, (ids * 7 + 3) % self.num_experts], -1)
        self.register_buffer("tid2eid", table)

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


def counts_of_two_ranks(experts: int) -> tuple[list[list[int]], torch.Tensor, list[list[float]]]:
    """Train one step of two micro-batches on this rank's own rows, at an expert-parallel degree.

    Returns:
        Tokens of each expert over all ranks, this rank's token ids, and the biases that moved.
    """
    parallelism = ParallelismConfig(data_parallel_shard_degree=2, expert_parallel_degree=experts)
    spec = spec_with_hash_layer(
        aux_losses=[GlobalBatchAuxLoss.Config(weight=0.1)], expert_bias=SignBias.Config(speed=0.1)
    )
    model, dims, context = build_model(
        spec,
        training=TrainingConfig(seq_len=32, mixed_precision_param="float32"),
        parallelism=parallelism,
        override_imports=[FLOAT32],
        seed=0,
    )
    hashed = routers_of([model])[0]
    balance = attach(model, None, dims, rows_per_step=8)
    generator = torch.Generator().manual_seed(dist.get_rank())
    batches = torch.randint(0, VOCABULARY, (2, 2, 32), generator=generator)
    for tokens in batches:
        hashed.input_ids = tokens
        with context():
            forward(model, tokens).float().square().mean().backward()
    balance.close_step()
    biases = [layer.expert_bias_E for layer in moe_layers_of([model])]
    moved = [local_shard(bias).tolist() for bias in biases if bias is not None]
    return balance.load().counts_ME.tolist(), batches, moved
