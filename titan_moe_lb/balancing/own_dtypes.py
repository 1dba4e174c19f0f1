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


class OwnDtypes(nn.Module):
    """Base class of modules that keep the dtypes of their buffers."""

    def _apply(self, fn: Callable, recurse: bool = True):
        return _apply_keeping_dtypes(self, fn, recurse, super()._apply)


def keep_dtypes(module: nn.Module) -> None:
    """Make an instance of a torchtitan class keep the dtypes of its buffers."""
    if "_apply" not in module.__dict__:
        object.__setattr__(module, "_apply", functools.partial(_apply_of_instance, module))


def _apply_of_instance(module: nn.Module, fn: Callable, recurse: bool = True) -> nn.Module:
    upstream = functools.partial(type(module)._apply, module)
    return _apply_keeping_dtypes(module, fn, recurse, upstream)


def _apply_keeping_dtypes(
    module: nn.Module, fn: Callable, recurse: bool, upstream: Callable[..., nn.Module]
) -> nn.Module:
    buffers = buffers_of(module)
    before = {name: buffer for name, buffer in buffers.items() if buffer is not None}
    upstream(fn, recurse)
    for name, buffer in before.items():
        after = buffers[name]
        assert after is not None
        if after.dtype != buffer.dtype:
            buffers[name] = buffer.to(after.device)
    return module
