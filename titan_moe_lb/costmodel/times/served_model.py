"""A model as a deployment has it: weights in BF16, and what a token costs in each layer."""

from __future__ import annotations

from dataclasses import dataclass

from titan_moe_lb.costmodel.times.kv_cache import KVCache
from titan_moe_lb.costmodel.times.layer import MoELayer


@dataclass(frozen=True, kw_only=True)
class ServedLayer:
    """One decoder layer."""

    linears: tuple[tuple[int, int], ...]
    """Inputs and outputs of each linear layer outside an MoE."""
    cache: KVCache


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """The decoder; layers that predict further tokens are left out."""

    model_name: str
    flavor: str
    moe_layers: dict[int, MoELayer]
    """MoE layers by number in the whole model, multi-token prediction included."""
    layers: tuple[ServedLayer, ...]
    head: tuple[int, int]
    """Inputs and outputs: D and the vocabulary."""
    shared_bytes: int
    """Weights that every rank has: all but the routed experts."""
    expert_bytes: dict[int, int]
    """Weights of one routed expert, by the number of its layer."""

    def weight_bytes(self, ep_degree: int, redundant_experts: int = 0) -> float:
        """On one rank, which has as many slots for experts as the others."""
        slots = {
            number: (self.moe_layers[number].num_experts + redundant_experts) / ep_degree
            for number in self.expert_bytes
        }
        routed = sum(slots[number] * size for number, size in self.expert_bytes.items())
        return self.shared_bytes + routed

    def cache_bytes(self, context: int) -> float:
        """Bytes of one sequence of ``context`` tokens."""
        return sum(
            layer.cache.bytes_per_token * layer.cache.kept_tokens(context) for layer in self.layers
        )
