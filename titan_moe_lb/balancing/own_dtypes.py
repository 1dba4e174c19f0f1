"""Buffers that follow their model to another device, and keep their dtype where it is cast.

``model.to(torch.bfloat16)`` casts every floating-point buffer. An expert bias in bfloat16 moves
in steps of 1/256 of itself, so that small updates are lost or doubled.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import nn

from titan_moe_lb.upstream.torch_internals import buffers_of


class OwnDtypes(nn.Module):
    """A module of ours that keeps the dtypes of its buffers."""

    def _apply(self, fn: Callable, recurse: bool = True):
        return _apply_keeping_dtypes(self, fn, recurse, super()._apply)


def keep_dtypes(module: nn.Module) -> None:
    """The same of a module whose class is torchtitan's."""
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
