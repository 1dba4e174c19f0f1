"""Linear layer of a router in float32, with equal results on GPUs and CPUs.

torchtitan's router requests float32 by ``torch.autocast(dtype=torch.float32)``, which torch
ignores on a CPU. Under mixed precision the layer would run there in bfloat16, and the scores of
many experts would tie.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext

import torch
from torch import nn
from torch.func import functional_call

HALF = (torch.bfloat16, torch.float16)


def in_float32(gate: nn.Module, x_BLD: torch.Tensor) -> torch.Tensor:
    """Compute the logits of a gate from float32 copies of its input and weights.

    The result equals a GPU's autocast to float32 bit for bit, including the gradients, which have
    the dtype of the weights. float32 and float64 tensors are not copied. If a subclass multiplies
    the input more than once, the input's gradient is summed in float32 before it is rounded.

    The gate is a linear layer or a subclass, such as one with LoRA adapters.

    Returns:
        ``(B, L, E)``, float32 or wider.
    """
    copies = {name: p.float() for name, p in _parameters(gate) if p.dtype in HALF}
    x_BLD = x_BLD.float() if x_BLD.dtype in HALF else x_BLD
    autocast = torch.is_autocast_enabled(x_BLD.device.type)
    with torch.autocast(x_BLD.device.type, enabled=False) if autocast else nullcontext():
        return functional_call(gate, copies, x_BLD) if copies else gate(x_BLD)


def _parameters(gate: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """List the parameters by name. A gate without adapters skips the walk over modules: 20 us."""
    if gate._modules:
        return gate.named_parameters()
    return [(name, p) for name, p in gate._parameters.items() if p is not None]
