"""Sizes of a model in a deployment: weights in BF16, linear layers and KV caches."""

from __future__ import annotations

from dataclasses import dataclass

from titan_moe_lb.costmodel.times.kv_cache import KVCache
from titan_moe_lb.costmodel.times.layer import MoELayer


@dataclass(frozen=True, kw_only=True)
class ServedLayer:
    """One decoder layer."""

    linears: tuple[tuple[int, int], ...]
    """Input and output widths of each linear layer outside the MoE."""
    cache: KVCache


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """Sizes of the decoder. Only ``moe_layers`` includes multi-token prediction."""

    model_name: str
    flavor: str
    moe_layers: dict[int, MoELayer]
    """MoE layers by number in the whole model."""
    layers: tuple[ServedLayer, ...]
    head: tuple[int, int]
    """Input and output widths of the head: D and the vocabulary size."""
    shared_bytes: int
    """Bytes of the weights that every rank holds: all but the routed experts."""
    expert_bytes: dict[int, int]
    """Bytes of one routed expert, by the number of its layer."""

    def weight_bytes(self, ep_degree: int, redundant_experts: int = 0) -> float:
        """Compute the bytes of the weights on one rank, with equal expert slots on every rank."""
        slots = {
            number: (self.moe_layers[number].num_experts + redundant_experts) / ep_degree
            for number in self.expert_bytes
        }
        routed = sum(slots[number] * size for number, size in self.expert_bytes.items())
        return self.shared_bytes + routed

    def cache_bytes(self, context: int) -> float:
        """Compute the cache bytes of one sequence of ``context`` tokens."""
        return sum(
            layer.cache.bytes_per_token * layer.cache.kept_tokens(context) for layer in self.layers
        )
