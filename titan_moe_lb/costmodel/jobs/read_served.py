"""Sizes of a model for serving, read from the model of a job."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from titan_moe_lb.costmodel.jobs.read_job import bind, meta_model
from titan_moe_lb.costmodel.times.gemm import BF16_BYTES
from titan_moe_lb.costmodel.times.served_model import KVCache, ServedLayer, ServedModel
from titan_moe_lb.errors import JobError
from titan_moe_lb.parallel.layer_numbers import layer_numbers
from titan_moe_lb.resolved_job import Job


def read_served(job: Job) -> ServedModel:
    """Build the model on the meta device and read its sizes for serving.

    The job is resolved for one process, and its config is modified.

    Raises:
        JobError: the model has no MoE layers, or its attention is of an unknown kind.
    """
    spec = job.config.model_spec
    numbers = layer_numbers(spec.model)
    moe_layers = bind(job)
    model = meta_model(spec.model, torch.bfloat16)
    blocks = {f"layers.{name}": block for name, block in model.layers.named_children()}
    layers = [
        ServedLayer(
            linears=tuple(
                (module.weight.shape[1], module.weight.shape[0])
                for part, module in block.named_modules()
                if isinstance(module, nn.Linear) and not part.startswith("moe.")
            ),
            cache=_cache(block.attention, _window(spec.model, layer)),
        )
        for (name, block), layer in zip(blocks.items(), spec.model.layers, strict=True)
    ]
    routed = {
        numbers[f"{name}.moe"]: _bytes(block.moe.routed_experts.inner_experts)
        for name, block in blocks.items()
        if f"{name}.moe" in numbers
    }
    further = _bytes(model.mtp_layers) if getattr(model, "mtp_layers", None) else 0
    vocabulary, dim = model.lm_head.weight.shape
    return ServedModel(
        model_name=spec.name,
        flavor=spec.flavor,
        moe_layers=moe_layers,
        layers=tuple(layers),
        head=(dim, vocabulary),
        shared_bytes=_bytes(model) - further - sum(routed.values()),
        expert_bytes={
            number: size // moe_layers[number].num_experts for number, size in routed.items()
        },
    )


def _bytes(module: nn.Module) -> int:
    return BF16_BYTES * sum(parameter.numel() for parameter in module.parameters())


def _window(model: Any, layer: Any) -> int | None:
    """Attention window (GPT-OSS) or chunk (Llama 4) of a layer, in tokens; None without either."""
    if getattr(layer, "mask", None) == "chunked":
        return model.chunk_size
    return getattr(layer.attention, "sliding_window_size", None)


def _cache(attention: Any, window: int | None) -> KVCache:
    """KV cache of a layer: keys and values of its KV heads, or latents and rotated key parts."""
    if hasattr(attention, "kv_lora_rank"):
        latent, rotated = attention.kv_lora_rank, attention.qk_rope_head_dim
        return KVCache(
            bytes_per_token=BF16_BYTES * (latent + rotated),
            # With wkv_b absorbed into queries and results, latents replace keys and values.
            decode_flops=2 * attention.n_heads * (2 * latent + rotated),
            prefill_flops=2 * attention.n_heads * (attention.qk_head_dim + attention.v_head_dim),
            window=window,
        )
    if not hasattr(attention, "n_kv_heads"):
        raise JobError(
            f"--serve: {type(attention).__name__} is neither grouped-query nor latent attention, "
            "whose caches are known"
        )
    flops = 4 * attention.n_heads * attention.head_dim
    return KVCache(
        bytes_per_token=BF16_BYTES * 2 * attention.n_kv_heads * attention.head_dim,
        decode_flops=flops,
        prefill_flops=flops,
        window=window,
    )
