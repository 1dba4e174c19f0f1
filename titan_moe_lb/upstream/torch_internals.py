"""Public names for private ones of torch 2.14, which newer versions may move. Torch alone."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.distributed import _functional_collectives
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as _wrapper
from torch.distributed.checkpoint.utils import _create_file_view
from torch.nn.attention.flex_attention import _DEFAULT_SPARSE_BLOCK_SIZE

all_reduce = _functional_collectives.all_reduce
"""All-reduce that supports autograd and the compiler."""

checkpoint_wrapper = _wrapper.checkpoint_wrapper
"""Activation checkpointing around a module."""

CHECKPOINT_PREFIX = _wrapper._CHECKPOINT_PREFIX
"""Prefix that :data:`checkpoint_wrapper` adds to the names of a module's parameters."""

file_view = _create_file_view
"""Open a part of a file of a distributed checkpoint as a file."""

FLEX_BLOCK_SIZE = _DEFAULT_SPARSE_BLOCK_SIZE
"""Tokens per block of flex attention's mask."""


def in_backward() -> bool:
    """Return True if the autograd engine calls, as in a forward that checkpointing recomputes."""
    return torch._C._current_graph_task_id() != -1


def compiler_backends() -> list[str]:
    """Return the names of the backends of ``torch.compile``; the first call takes seconds."""
    import torch._dynamo

    return torch._dynamo.list_backends(exclude_tags=())


def buffers_of(module: nn.Module) -> dict[str, torch.Tensor | None]:
    """Return the dict in which the module keeps its buffers."""
    return module._buffers


def ignore_buffers(model: nn.Module, names: Iterable[str]) -> None:
    """Keep DistributedDataParallel from copying buffers of rank 0 to all ranks at every forward.

    The model is not wrapped yet.
    """
    ignored = getattr(model, "_ddp_params_and_buffers_to_ignore", [])
    model._ddp_params_and_buffers_to_ignore = [*ignored, *names]  # type: ignore[assignment]
