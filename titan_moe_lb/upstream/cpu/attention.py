"""FlexAttention on the host, with a dense mask.

Upstream facts: FlexAttention has no CPU backward. torchtitan compiles both the kernel and the
construction of its block mask, which takes seconds on a CPU before the first step. Here, a block
mask skips no block (``dense_block_mask``). It is evaluated when it is made, once for all layers, to
the boolean matrix that ``scaled_dot_product_attention`` expects.

Shape suffixes: B = batch, L = query length, N = heads, H = head dimension,
S = key length (differs from L under context parallelism).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import spmd_types as spmd
import torch
import torch.nn.functional as F
from spmd_types.runtime import get_local_type, get_partition_spec
from torch.distributed.tensor.experimental._context_parallel import (
    _attention as context_parallel,
)
from torch.nn.attention.flex_attention import BlockMask, create_mask
from torchtitan.config.override import derive, override
from torchtitan.distributed.utils import get_spmd_backend
from torchtitan.models.common import attention as upstream
from torchtitan.models.common.attention import FlexAttention


def look_up(
    mask_BNLS: torch.Tensor,
    b: torch.Tensor,
    h: torch.Tensor,
    q_idx: torch.Tensor,
    kv_idx: torch.Tensor,
) -> torch.Tensor:
    """Look up an evaluated mask; with its first argument bound, this is a mask function."""
    return mask_BNLS[b, h, q_idx, kv_idx]


def dense_block_mask(
    mask_mod: Callable[..., torch.Tensor],
    B: int | None,
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
    device: str | torch.device = "cpu",
    BLOCK_SIZE: int | tuple[int, int] = 128,
    **ignored: object,
) -> BlockMask:
    """Make a block mask of all blocks, whose ``mask_mod`` is a partial :func:`look_up`.

    If a block mask is an input of a traced graph, torch finds the tensor in this partial. See
    ``torch.nn.attention.flex_attention.create_block_mask`` for the arguments.
    """
    # The integer arithmetic of a mask has no SPMD rule.
    with spmd.no_typecheck():
        mask_BNLS = create_mask(mask_mod, B, H, Q_LEN, KV_LEN, device=device)
    query_block, key_block = (
        BLOCK_SIZE if isinstance(BLOCK_SIZE, tuple) else (BLOCK_SIZE, BLOCK_SIZE)
    )
    query_blocks = -(-Q_LEN // query_block)
    key_blocks = -(-KV_LEN // key_block)
    shape = (B or 1, H or 1, query_blocks)
    key_indices = torch.arange(key_blocks, dtype=torch.int32, device=device)
    return BlockMask.from_kv_blocks(
        torch.full(shape, key_blocks, dtype=torch.int32, device=device),
        key_indices.expand(*shape, key_blocks).contiguous(),
        BLOCK_SIZE=(query_block, key_block),
        mask_mod=functools.partial(look_up, mask_BNLS),
        seq_lengths=(Q_LEN, KV_LEN),
    )


def use_uncompiled_block_mask() -> None:
    """Replace the compiled ``create_block_mask`` of torchtitan and torch, by monkeypatching.

    Upstream fact: ``create_attention_mask`` always calls its module's
    ``_compiled_create_block_mask``, and so does torch when it cuts a mask for context parallelism.
    No setting turns the compilation off. Only our dense attention reads the result.
    """
    for module in (upstream, context_parallel):
        module._compiled_create_block_mask = dense_block_mask  # type: ignore[union-attr]


class DenseMaskAttention(FlexAttention):
    """Attention with FlexAttention's interface, on ``scaled_dot_product_attention``."""

    @dataclass(kw_only=True, slots=True)
    class Config(FlexAttention.Config):
        """Config of :class:`DenseMaskAttention`."""

    # The parameter names are part of the contract: torchtitan's local_map looks up the shardings
    # by them.
    def forward(
        self,
        q_BLNH: torch.Tensor,
        k_BLNH: torch.Tensor,
        v_BLNH: torch.Tensor,
        *,
        attention_masks: BlockMask,
        score_mod: Callable | None = None,
        scale: float | None = None,
        enable_gqa: bool = False,
        out_transform: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        **kwargs: object,
    ) -> torch.Tensor:
        """Return the attention output ``(B, L, N, H)``, or ``out_transform(output, logsumexp)``."""
        if score_mod is not None:
            raise NotImplementedError("score_mod is not supported by the host attention")
        q_BNLH, k_BNSH, v_BNSH = (t.transpose(1, 2) for t in (q_BLNH, k_BLNH, v_BLNH))
        assert isinstance(attention_masks.mask_mod, functools.partial)
        (mask_BNLS,) = attention_masks.mask_mod.args
        # Types are asserted at the boundary alone, as torchtitan does around its own flex kernel.
        with spmd.no_typecheck():
            if out_transform is None:
                out_BNLH = F.scaled_dot_product_attention(
                    q_BNLH, k_BNSH, v_BNSH, attn_mask=mask_BNLS, scale=scale, enable_gqa=enable_gqa
                )
                logsumexp_BNL = None
            else:
                out_BNLH, logsumexp_BNL = _softmax_attention(
                    q_BNLH, k_BNSH, v_BNSH, mask_BNLS, scale
                )
            out_BLNH = out_BNLH.transpose(1, 2)
        typed = get_spmd_backend() == "spmd_types" and spmd.is_type_checking()
        if typed:
            spmd.assert_type(out_BLNH, get_local_type(q_BLNH), get_partition_spec(q_BLNH))
        if out_transform is None:
            return out_BLNH
        assert logsumexp_BNL is not None
        with spmd.no_typecheck():
            logsumexp_BLN = logsumexp_BNL.transpose(1, 2)
        if typed:
            spec = get_partition_spec(q_BLNH)
            spmd.assert_type(
                logsumexp_BLN,
                get_local_type(q_BLNH),
                None if spec is None else spmd.PartitionSpec(*spec[:-1]),
            )
        return out_transform(out_BLNH, logsumexp_BLN)


def _softmax_attention(
    q_BNLH: torch.Tensor,
    k_BNSH: torch.Tensor,
    v_BNSH: torch.Tensor,
    mask_BNLS: torch.Tensor,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the attention ``(B, N, L, H)`` and the logsumexp of the masked scores, float32."""
    groups = q_BNLH.shape[1] // k_BNSH.shape[1]
    k_BNSH = k_BNSH.repeat_interleave(groups, dim=1)
    v_BNSH = v_BNSH.repeat_interleave(groups, dim=1)
    scale = q_BNLH.shape[-1] ** -0.5 if scale is None else scale
    scores_BNLS = (q_BNLH.float() @ k_BNSH.float().transpose(-1, -2)) * scale
    scores_BNLS = scores_BNLS.masked_fill(~mask_BNLS, float("-inf"))
    logsumexp_BNL = torch.logsumexp(scores_BNLS, dim=-1)
    weights_BNLS = torch.softmax(scores_BNLS, dim=-1)
    return (weights_BNLS @ v_BNSH.float()).to(q_BNLH.dtype), logsumexp_BNL


@override(target=FlexAttention.Config, description="dense mask instead of a flex kernel")
def dense_mask_attention(config: FlexAttention.Config) -> DenseMaskAttention.Config:
    """Replace the config of a FlexAttention by a :class:`DenseMaskAttention`'s."""
    return derive(config, DenseMaskAttention.Config)
