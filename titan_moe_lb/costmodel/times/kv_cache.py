"""Bytes of KV caches, and the time of attention over them."""

from __future__ import annotations

from dataclasses import dataclass

from titan_moe_lb.costmodel.hardware.device import Hardware


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
