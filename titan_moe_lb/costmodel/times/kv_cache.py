"""What attention keeps of the tokens of a sequence, and what reading it takes."""

from __future__ import annotations

from dataclasses import dataclass

from titan_moe_lb.costmodel.hardware.device import Hardware


@dataclass(frozen=True, kw_only=True)
class KVCache:
    """Of one layer."""

    bytes_per_token: float
    decode_flops: float
    """Of a new token, for each one that it attends to."""
    prefill_flops: float
    """The same in a prefill, where latent attention works on its expanded keys and values."""
    window: int | None = None
    """The most tokens that one attends to; None for all."""

    def kept_tokens(self, context: float) -> float:
        """Of a sequence of so many."""
        return context if self.window is None else min(context, self.window)

    def decode_seconds(self, sequences: float, context: float, hardware: Hardware) -> float:
        """One new token of each sequence, each of which has so many tokens."""
        pairs = sequences * self.kept_tokens(context)
        return max(
            pairs * self.decode_flops / hardware.bf16_flops,
            pairs * self.bytes_per_token / hardware.memory_bandwidth,
        )

    def prefill_seconds(self, tokens: float, context: float, hardware: Hardware) -> float:
        """So many tokens of prompts of the length ``context``, of one at least: a token attends
        to the half of it in the mean, or to its window. The cache is read once a prompt."""
        kept = self.kept_tokens(context)
        attended = kept - kept**2 / (2 * context)
        return max(
            tokens * attended * self.prefill_flops / hardware.bf16_flops,
            max(1.0, tokens / context) * kept * self.bytes_per_token / hardware.memory_bandwidth,
        )
