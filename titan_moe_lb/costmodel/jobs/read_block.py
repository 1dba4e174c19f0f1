"""Bytes that a transformer block keeps for the backward outside its routed experts, by hand.

Sizes are read from the module, shapes are those that torchtitan's eager forward makes. All are
bytes of one token of the rank, where tensor parallelism gives a rank 1/TP of the tokens: what
every rank of TP has whole, for the tokens of all, counts TP times.

N = heads, H = head dimension, S = keys of a sequence, D = model dimension, F = hidden
dimension of the dense or shared experts, E = experts, K = top_k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from titan_moe_lb.costmodel.hardware.roofline import BF16_BYTES, FP32_BYTES
from titan_moe_lb.costmodel.times.job import Block

INDEX_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class BlockReader:
    """Reads blocks of a job."""

    tp_degree: int
    seq_len: int
    on_host: bool
    """Operators that a GPU has as one kernel are composed on the host: norms, and attention
    where it has sinks or where queries and values differ in size."""

    def read(self, block: nn.Module, moe_layer: int | None) -> Block:
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
            # In the order in which they run.
            of_layer += [_columns(getattr(feed_forward, name)) for name in ("w1", "w3", "w2")]
        # Of the linear layers every second one, from the first on, and the scores or the result
        # of attention.
        selective = BF16_BYTES * sum(of_layer[::2])
        selective += (
            FP32_BYTES * heads * (self.seq_len + values)
            if composed
            else BF16_BYTES * heads * values + FP32_BYTES * heads
        )
        # The input of w1 and w3; their results, the activation, and the product.
        ahead = self.norm(dim) + BF16_BYTES * (dim * self.tp_degree + 4 * hidden)
        if moe_layer is not None:
            ahead += self._routing(parts.moe.router, dim)
            selective += INDEX_BYTES * parts.moe.router.top_k
        scores = self._scores(parts.attention, heads, composed)
        results = BF16_BYTES * sum(of_attention)
        if composed:
            # Scores and masked scores, or those and their softmax; the mask in BF16; queries and
            # keys in float32 before and after they are scaled, and both in BF16 once more.
            forward = FP32_BYTES * heads * (2 * self.seq_len + 3 * queries) + results
            forward += BF16_BYTES * (self.seq_len * self.tp_degree + 2 * heads * queries)
            backward = FP32_BYTES * heads * (2 * self.seq_len + values)
        else:
            # What the kernel takes is kept; gradients of queries, keys and values.
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
        """RMSNorm: its input and 1/rms in float32; on the host the normalized input as well.

        Its result is counted where it is the input of something.
        """
        each = 2 * FP32_BYTES if self.on_host else BF16_BYTES
        return each * width + FP32_BYTES * rows

    def _projections(self, attention: Any) -> float:
        """Between the input of attention and queries, keys and values."""
        if hasattr(attention, "kv_lora_rank"):
            # Latents are whole on every rank of TP; the rotation is a table of complex numbers.
            widths = [rank for rank in (attention.q_lora_rank, attention.kv_lora_rank) if rank]
            latents = sum(self.norm(width) + BF16_BYTES * width for width in widths)
            return self.tp_degree * (latents + FP32_BYTES * attention.qk_rope_head_dim)
        norms = 0.0
        if getattr(attention, "q_norm", None) is not None:
            norms = sum(
                self.norm(heads * attention.head_dim, rows=heads)
                for heads in (attention.n_heads, attention.n_kv_heads)
            )
        # Sines and cosines of every position.
        return norms + self.tp_degree * 2 * FP32_BYTES * attention.head_dim

    def _inner(
        self, attention: Any, heads: int, queries: int, values: int, composed: bool
    ) -> float:
        """Queries, keys and values, and the result, which is the input of wo."""
        result = BF16_BYTES * heads * values
        if composed:
            # In float32, keys and values repeated for the heads that share them.
            return FP32_BYTES * heads * (2 * queries + values) + result
        if hasattr(attention, "kv_lora_rank"):
            # Values are a view of what wkv_b gave, which stays whole.
            kept = heads * (2 * queries + attention.qk_nope_head_dim + values)
        else:
            kept = (heads + 2 * attention.n_kv_heads) * queries
        return BF16_BYTES * kept + FP32_BYTES * heads + result

    def _scores(self, attention: Any, heads: int, composed: bool) -> float:
        """The square that only the host keeps: the softmax, and with sinks the scores as well;
        its kernel the mask, in BF16."""
        if composed:
            squares = 2 if hasattr(attention, "sinks") else 1
            return squares * FP32_BYTES * heads * self.seq_len
        return BF16_BYTES * self.seq_len * self.tp_degree if self.on_host else 0.0

    def _routing(self, router: Any, dim: int) -> float:
        """Input and scores of the gate in float32; experts, and the order of the experts."""
        choices = 3 * (INDEX_BYTES + FP32_BYTES) * router.top_k
        return FP32_BYTES * (dim + router.num_experts) + choices


def _heads(attention: Any) -> tuple[int, int, int]:
    """Heads, and the dimensions of a query and of a value."""
    if hasattr(attention, "kv_lora_rank"):
        return attention.n_heads, attention.qk_head_dim, attention.v_head_dim
    return attention.n_heads, attention.head_dim, attention.head_dim


def _linears(attention: nn.Module) -> list[int]:
    """Values that each linear layer gives, in order."""
    return [_columns(module) for module in attention.modules() if isinstance(module, nn.Linear)]


def _columns(linear: Any) -> int:
    return linear.weight.shape[0]
