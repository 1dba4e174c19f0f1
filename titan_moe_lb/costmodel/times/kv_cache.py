"""KV caches: their bytes, and the time of attending to them."""

from __future__ import annotations

from dataclasses import dataclass

from titan_moe_lb.costmodel.hardware.device import Hardware


@dataclass(frozen=True, kw_only=True)
class KVCache:
    """KV cache of one layer."""

    bytes_per_token: float
    decode_flops: float
    """FLOPs of a new token, for each token that it attends to."""
    prefill_flops: float
    """FLOPs in a prefill, where latent attention works on its expanded keys and values."""
    window: int | None = None
    """The most tokens that one attends to; None for all."""

    def kept_tokens(self, context: float) -> float:
        """Tokens that the cache keeps of a sequence."""
        return context if self.window is None else min(context, self.window)

    def decode_seconds(self, sequences: float, context: float, hardware: Hardware) -> float:
        """Time of one new token of each sequence of ``context`` tokens."""
        pairs = sequences * self.kept_tokens(context)
        return max(
            pairs * self.decode_flops / hardware.bf16_flops,
            pairs * self.bytes_per_token / hardware.memory_bandwidth,
        )

    def prefill_seconds(self, tokens: float, context: float, hardware: Hardware) -> float:
        """Prefill of at least one prompt of ``context`` tokens. A token attends to half of it in
        the mean, or to its window. The cache is read once a prompt."""
        kept = self.kept_tokens(context)
        attended = kept - kept**2 / (2 * context)
        return max(
            tokens * attended * self.prefill_flops / hardware.bf16_flops,
            max(1.0, tokens / context) * kept * self.bytes_per_token / hardware.memory_bandwidth,
        )
