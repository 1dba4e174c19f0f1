"""The linear layer of a router in float32, the same on a GPU and on the host.

torchtitan's router asks for it by ``torch.autocast(dtype=torch.float32)``, which torch ignores on
a host: there the layer runs in bfloat16 under mixed precision, and the scores of many experts tie.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.func import functional_call

HALF = (torch.bfloat16, torch.float16)


def in_float32(gate: nn.Module, x_BLD: torch.Tensor) -> torch.Tensor:
    """Logits of a gate, computed from float32 copies of its input and weights.

    Bit for bit the autocast of a GPU to float32, gradients included, which have the dtype of the
    weights. float32 and float64 are computed as they are, without a copy. Where a subclass
    multiplies the input more than once, its gradient is added up in float32 before it is rounded.

    Args:
        gate: a linear layer or a subclass, such as one with LoRA adapters.
        x_BLD: ``(B, L, D)``.

    Returns:
        ``(B, L, E)``, float32 or wider.
    """
    copies = {name: p.float() for name, p in gate.named_parameters() if p.dtype in HALF}
    x_BLD = x_BLD.float() if x_BLD.dtype in HALF else x_BLD
    with torch.autocast(device_type=x_BLD.device.type, enabled=False):
        return functional_call(gate, copies, x_BLD) if copies else gate(x_BLD)
