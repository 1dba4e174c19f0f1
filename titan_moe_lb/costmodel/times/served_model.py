"""Sizes of a model in a deployment: weights in BF16, linear layers, and KV caches with their time."""

from __future__ import annotations

from dataclasses import dataclass

from titan_moe_lb.costmodel.hardware.device import Hardware
from titan_moe_lb.costmodel.times.moe_layer import MoELayer


@dataclass(frozen=True, kw_only=True)
class KVCache:
    """KV cache of one layer."""

    bytes_per_token: float
    decode_flops: float
    """FLOPs of a new token for each token that it attends to."""
    prefill_flops: float
    """FLOPs of a prompt token for each token that it attends to. Latent attention works on
    expanded keys and values here."""
    window: int | None = None
    """Most tokens that a token attends to; None for all."""

    def kept_tokens(self, context: float) -> float:
        """Count the tokens of a sequence that the cache keeps."""
        return context if self.window is None else min(context, self.window)

    def decode_seconds(self, sequences: float, context: float, hardware: Hardware) -> float:
        """Time of one new token for each sequence of ``context`` tokens, in seconds."""
        pairs = sequences * self.kept_tokens(context)
        return max(
            pairs * self.decode_flops / hardware.bf16_flops,
            pairs * self.bytes_per_token / hardware.memory_bandwidth,
        )

    def prefill_seconds(self, tokens: float, context: float, hardware: Hardware) -> float:
        """Time to prefill at least one prompt of ``context`` tokens, in seconds.

        On average a token attends to half of its prompt, or to its window if there is one. The
        cache is read once for each prompt.
        """
        kept = self.kept_tokens(context)
        attended = kept - kept**2 / (2 * context)
        return max(
            tokens * attended * self.prefill_flops / hardware.bf16_flops,
            max(1.0, tokens / context) * kept * self.bytes_per_token / hardware.memory_bandwidth,
        )


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
