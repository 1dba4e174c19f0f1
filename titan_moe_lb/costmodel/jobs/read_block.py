"""Bytes that a transformer block saves for the backward, without its routed experts.

The formulas follow torchtitan's eager forward, with sizes read from the module. All bytes are per
token of a rank. With tensor parallelism a rank has 1/TP of the tokens, so a tensor that every TP
rank holds for all tokens counts TP times.

N = heads, H = head dimension, S = keys of a sequence, D = model dimension, F = hidden
dimension of the dense or shared experts, E = experts, K = top_k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from titan_moe_lb.costmodel.times.gemm import BF16_BYTES, FP32_BYTES
from titan_moe_lb.costmodel.times.job import Block

INDEX_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class BlockReader:
    """Reader of a job's transformer blocks."""

    tp_degree: int
    seq_len: int
    on_host: bool
    """True to plan for a host, where torch runs norms as several operators. It does so with
    attention, too, if there are sinks or if queries and values differ in size."""

    def read(self, block: nn.Module, moe_layer: int | None) -> Block:
        """Count the bytes of one block; ``moe_layer`` is None for a dense one."""
        parts: Any = block
        heads, queries, values = _heads(parts.attention)
        composed = self.on_host and (hasattr(parts.attention, "sinks") or queries != values)
        dim = parts.attention_norm.weight.shape[0]
        of_attention = _linears(parts.attention)
        of_layer = list(of_attention)
        feed_forward = parts.feed_forward if moe_layer is None else parts.moe.shared_experts
        hidden = 0
        if feed_forward is not None:
            hidden = feed_forward.w1.weight.shape[0]
            # The forward runs them in this order.
            of_layer += [_columns(getattr(feed_forward, name)) for name in ("w1", "w3", "w2")]
        # The selective policy saves every second linear layer, starting with the first, and the
        # scores or the result of attention.
        selective = BF16_BYTES * sum(of_layer[::2])
        selective += (
            FP32_BYTES * heads * (self.seq_len + values)
            if composed
            else BF16_BYTES * heads * values + FP32_BYTES * heads
        )
        # The input of w1 and w3, their two results, the activation, and the product.
        ahead = self.norm(dim) + BF16_BYTES * (dim * self.tp_degree + 4 * hidden)
        if moe_layer is not None:
            ahead += self._routing(parts.moe.router, dim)
            selective += INDEX_BYTES * parts.moe.router.top_k
        scores = self._scores(parts.attention, heads, composed)
        results = BF16_BYTES * sum(of_attention)
        if composed:
            # Two of scores, masked scores and softmax at a time; the mask in BF16; queries and
            # keys in float32 before and after scaling, and once more in BF16.
            forward = FP32_BYTES * heads * (2 * self.seq_len + 3 * queries) + results
            forward += BF16_BYTES * (self.seq_len * self.tp_degree + 2 * heads * queries)
            backward = FP32_BYTES * heads * (2 * self.seq_len + values)
        else:
            # The inputs of the kernel are saved already. The backward adds the gradients of
            # queries, keys and values.
            forward = results
            backward = BF16_BYTES * heads * (2 * queries + values)
        return Block(
            moe_layer=moe_layer,
            attention=self.norm(dim)
            + BF16_BYTES * dim * self.tp_degree
            + self._projections(parts.attention)
            + self._inner(parts.attention, heads, queries, values, composed)
            + scores,
            attention_forward=forward - scores,
            attention_backward=backward,
            feed_forward=ahead,
            selective=selective,
        )

    def norm(self, width: int, rows: int = 1) -> float:
        """Bytes that an RMSNorm saves: its input, and 1/rms in float32.

        The input is in BF16. On the host it is in float32, and the normalized input is saved as
        well. The result counts at the operation that reads it.
        """
        each = 2 * FP32_BYTES if self.on_host else BF16_BYTES
        return each * width + FP32_BYTES * rows

    def _projections(self, attention: Any) -> float:
        """Bytes saved between the input of attention and its queries, keys and values."""
        if hasattr(attention, "kv_lora_rank"):
            # Every TP rank holds whole latents. The rotation is a table of complex numbers.
            widths = [rank for rank in (attention.q_lora_rank, attention.kv_lora_rank) if rank]
            latents = sum(self.norm(width) + BF16_BYTES * width for width in widths)
            return self.tp_degree * (latents + FP32_BYTES * attention.qk_rope_head_dim)
        norms = 0.0
        if getattr(attention, "q_norm", None) is not None:
            norms = sum(
                self.norm(heads * attention.head_dim, rows=heads)
                for heads in (attention.n_heads, attention.n_kv_heads)
            )
        # The rotation is a table of sines and cosines.
        return norms + self.tp_degree * 2 * FP32_BYTES * attention.head_dim

    def _inner(
        self, attention: Any, heads: int, queries: int, values: int, composed: bool
    ) -> float:
        """Bytes of queries, keys, values, and the result of attention, which is the input of wo."""
        result = BF16_BYTES * heads * values
        if composed:
            # All are in float32, with keys and values repeated for the heads that share them.
            return FP32_BYTES * heads * (2 * queries + values) + result
        if hasattr(attention, "kv_lora_rank"):
            # Values are a view of wkv_b's result, which is saved whole.
            kept = heads * (2 * queries + attention.qk_nope_head_dim + values)
        else:
            kept = (heads + 2 * attention.n_kv_heads) * queries
        return BF16_BYTES * kept + FP32_BYTES * heads + result

    def _scores(self, attention: Any, heads: int, composed: bool) -> float:
        """Bytes of attention scores or masks, which only the host saves.

        Composed attention saves the softmax, and with sinks the scores as well, in float32. The
        host's attention kernel saves the mask in BF16.
        """
        if composed:
            squares = 2 if hasattr(attention, "sinks") else 1
            return squares * FP32_BYTES * heads * self.seq_len
        return BF16_BYTES * self.seq_len * self.tp_degree if self.on_host else 0.0

    def _routing(self, router: Any, dim: int) -> float:
        """Bytes of the gate's input and scores in float32, the choices, and the token order."""
        choices = 3 * (INDEX_BYTES + FP32_BYTES) * router.top_k
        return FP32_BYTES * (dim + router.num_experts) + choices


def _heads(attention: Any) -> tuple[int, int, int]:
    """Head count, dimension of a query, and dimension of a value."""
    if hasattr(attention, "kv_lora_rank"):
        return attention.n_heads, attention.qk_head_dim, attention.v_head_dim
    return attention.n_heads, attention.head_dim, attention.head_dim


def _linears(attention: nn.Module) -> list[int]:
    """Output width of each linear layer, in module order."""
    return [_columns(module) for module in attention.modules() if isinstance(module, nn.Linear)]


def _columns(linear: Any) -> int:
    return linear.weight.shape[0]
