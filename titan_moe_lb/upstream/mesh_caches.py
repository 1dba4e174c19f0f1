"""Caches of torch and spmd_types that outlive a process group."""

from __future__ import annotations

import spmd_types._mesh_axis
from torch.distributed.tensor.debug import _clear_sharding_prop_cache


def forget_meshes() -> None:
    """Drop what spmd_types and DTensor have cached about a destroyed process group."""
    spmd_types._mesh_axis._reset()
    _clear_sharding_prop_cache()
