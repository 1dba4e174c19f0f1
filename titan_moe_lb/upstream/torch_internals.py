"""Private names of torch 2.14 and spmd_types, under public ones: what a newer torch may move."""

from __future__ import annotations

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.distributed import _functional_collectives
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as _wrapper
from torch.distributed.checkpoint.utils import _create_file_view
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.nn.attention.flex_attention import _DEFAULT_SPARSE_BLOCK_SIZE

all_reduce = _functional_collectives.all_reduce
"""All-reduce that autograd and the compiler see."""

checkpoint_wrapper = _wrapper.checkpoint_wrapper
"""Activation checkpointing around a module."""

file_view = _create_file_view
"""Part of a file of a distributed checkpoint, as a file of its own."""

FLEX_BLOCK_SIZE = _DEFAULT_SPARSE_BLOCK_SIZE
"""Tokens of a block of flex attention's mask."""


def in_backward() -> bool:
    """Whether the autograd engine calls, as in the forward that checkpointing repeats."""
    return torch._C._current_graph_task_id() != -1


def compiler_backends() -> list[str]:
    """Names of the backends of ``torch.compile``. The import takes seconds."""
    import torch._dynamo

    return torch._dynamo.list_backends(exclude_tags=())


def buffers_of(module: nn.Module) -> dict[str, torch.Tensor | None]:
    """The module's own table of its buffers."""
    return module._buffers


def forget_meshes() -> None:
    """Drop what spmd_types and DTensor have saved of a process group that is gone."""
    import spmd_types._mesh_axis

    spmd_types._mesh_axis._reset()
    _clear_sharding_prop_cache()
