"""Aux losses of gates that learn nothing."""

from __future__ import annotations

import logging

from torch import nn

from titan_moe_lb.balancing.router import LoadBalancedRouter


def warn_without_effect(model_parts: list[nn.Module]) -> None:
    """Warn of the layers whose aux losses can change no weight: all parameters up to their gate are
    frozen. The order is that of registration, which in torchtitan's models is that of the forward;
    a model that registers an earlier module later gets a warning too much."""
    frozen = []
    for part in model_parts:
        trained: list[nn.Parameter] = []
        for module in part.modules():
            trained += [p for p in module.parameters(recurse=False) if p.requires_grad]
            if isinstance(module, LoadBalancedRouter) and len(module.aux_losses):
                trained += [p for p in module.parameters() if p.requires_grad]
                if not trained:
                    frozen.append(str(module.layer))
    if frozen:
        logging.getLogger().warning(
            f"aux_losses have no effect in layer {', '.join(frozen)}: the gate and all weights "
            "before it are frozen; train one of them, or leave the losses out"
        )
