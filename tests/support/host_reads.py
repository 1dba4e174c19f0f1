"""Refusal of calls that would make the host wait for the device, without a device.

A host tensor never waits, so a wait is recognized by its call: methods of ``torch.Tensor`` that
return numbers, and operators whose result or shape the host reads. The check also looks into custom
operators, which a dispatch mode does not do.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# What ends in an operator (item, bool, int, float, index) is refused as that operator.
METHODS = ("cpu", "numpy", "tolist", "__array__", "__dlpack__")
OPERATORS = frozenset(
    {
        "item",
        "_local_scalar_dense",
        "is_nonzero",
        "equal",
        "allclose",
        "nonzero",
        "masked_select",
        "unique_dim",
        "unique_consecutive",
        "_unique",
        "_unique2",
        "bincount",
    }
)
BUILT_IN = ("aten", "prim", "prims")
_HOST = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


class RefuseHostReads(TorchDispatchMode):
    """Context manager that raises ``AssertionError`` at the first wait."""

    def __enter__(self) -> RefuseHostReads:
        self._patches = ExitStack()
        for name in METHODS:
            self._patches.enter_context(patch.object(torch.Tensor, name, _refused(name)))
        self._patches.enter_context(patch.object(torch.Tensor, "to", _to_a_device))
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        self._patches.close()
        super().__exit__(*exception)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in OPERATORS or _sized_by_a_tensor(name, args, kwargs):
            raise _wait(func)
        if func.namespace in BUILT_IN:
            return func(*args, **kwargs)
        # The operator's own code with this mode on, its methods refused already.
        TorchDispatchMode.__enter__(self)
        try:
            return func.redispatch(_HOST, *args, **kwargs)
        finally:
            TorchDispatchMode.__exit__(self, None, None, None)


def _sized_by_a_tensor(name: str, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Return True if the shape of the result is a number in a tensor."""
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    return False


def _refused(method: str):
    def refuse(self: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        raise _wait(f"Tensor.{method}")

    return refuse


_original_to = torch.Tensor.to


def _to_a_device(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Return True unless the target is the host: ``tensor.to(other.device)`` may stay on a
    device."""
    if any(
        isinstance(value, str) and value.startswith("cpu") for value in (*args, *kwargs.values())
    ):
        raise _wait("Tensor.to")
    return _original_to(self, *args, **kwargs)


def _wait(what: object) -> AssertionError:
    return AssertionError(f"{what} makes the host wait for the device")
