"""Checks of MoE layers: foreign routers, frozen weights, and moved, cast or non-finite tensors."""

from __future__ import annotations

import logging

import torch
from torch import nn
from torchtitan.models.common.moe import MoE

from titan_moe_lb.balancing.router import LoadBalancedRouter
from titan_moe_lb.errors import JobError
from titan_moe_lb.parallel.local_shard import local_shard


def unbalanced_layers_of(model_parts: list[nn.Module]) -> list[tuple[str, MoE]]:
    """Find the MoE layers of this rank whose router is not a :class:`LoadBalancedRouter`."""
    return [
        (name, module)
        for part in model_parts
        for name, module in part.named_modules()
        if isinstance(module, MoE) and not isinstance(module.router, LoadBalancedRouter)
    ]


def check_tensors(layers: list[MoE], device: torch.device) -> None:
    """Check the devices and dtypes of layers, without reading from the device."""
    for layer in layers:
        router = layer.router
        if layer.tokens_per_expert_E.device != device:
            raise JobError(
                f"layer {router.layer} is on {layer.tokens_per_expert_E.device}, but its loop's record is "
                f"on {device}: move the model before attach(), or back before it trains"
            )
        states = [*layer.named_buffers(recurse=False), *router.aux_losses.named_buffers()]
        if router.expert_bias is not None:
            states += router.expert_bias.named_buffers()
        for name, buffer in states:
            if buffer.is_floating_point() and buffer.dtype != torch.float32:
                raise JobError(
                    f"{name} of layer {router.layer} is {buffer.dtype}, in which small updates "
                    "are lost: load and assign it as float32"
                )


def not_finite(layers: list[MoE]) -> list[int]:
    """Find the layers whose gate or expert bias is not finite on this rank.

    Waits for the device.

    Returns:
        Numbers of the layers in the whole model.
    """
    finite = []
    for layer in layers:
        tensors = [layer.router.gate.weight, layer.expert_bias_E]
        found = [local_shard(t).isfinite().all() for t in tensors if t is not None]
        finite.append(torch.stack(found).all())
    are_finite = torch.stack(finite).tolist() if finite else []
    return [layer.router.layer for layer, yes in zip(layers, are_finite, strict=True) if not yes]


def warn_without_effect(model_parts: list[nn.Module]) -> None:
    """Warn about layers whose aux losses cannot change any weight.

    All parameters of such a layer's gate and of the modules before it are frozen. The order of the
    modules is that of registration, which in torchtitan's models is the order of the forward. A
    model that registers an earlier module later can receive a false warning.
    """
    frozen = []
    for part in model_parts:
        trained: list[nn.Parameter] = []
        for module in part.modules():
            trained += [p for p in module.parameters(recurse=False) if p.requires_grad]
            if (
                isinstance(module, LoadBalancedRouter)
                and len(module.aux_losses)
                and "losses" not in module.config.frozen
            ):
                trained += [p for p in module.parameters() if p.requires_grad]
                if not trained:
                    frozen.append(str(module.layer))
    if frozen:
        logging.getLogger().warning(
            f"aux_losses have no effect in layer {', '.join(frozen)}: the gate and all weights "
            "before it are frozen; train one of them, or leave the losses out"
        )
