"""Buffers that keep their dtype when their model is cast.

``model.to(torch.bfloat16)`` casts every floating-point buffer. An expert bias in bfloat16 changes
in steps of 1/256 of its value, so small updates are lost or doubled. The buffers still follow
their model to another device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import nn

from titan_moe_lb.upstream.torch_internals import buffers_of


def keep_dtypes(module: nn.Module) -> None:
    """Make a module keep the dtypes of its buffers; those of its children may be cast."""
    if "_apply" not in module.__dict__:
        object.__setattr__(module, "_apply", functools.partial(_apply_keeping_dtypes, module))


def _apply_keeping_dtypes(module: nn.Module, fn: Callable, recurse: bool = True) -> nn.Module:
    buffers = buffers_of(module)
    before = {name: buffer for name, buffer in buffers.items() if buffer is not None}
    type(module)._apply(module, fn, recurse)
    for name, buffer in before.items():
        after = buffers[name]
        assert after is not None
        if after.dtype != buffer.dtype:
            buffers[name] = buffer.to(after.device)
    return module
