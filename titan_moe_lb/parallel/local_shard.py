"""Local shards of distributed tensors."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import spmd_types as spmd
import torch
from spmd_types.runtime import get_local_type, get_partition_spec
from torch.distributed.tensor import DTensor


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """Return the local tensor of a DTensor, or a plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def untyped() -> AbstractContextManager:
    """Pause the checks of SPMD types, where they are on: local tensors have none."""
    return spmd.no_typecheck() if spmd.is_type_checking() else nullcontext()


def squared_norm(tensor: torch.Tensor) -> torch.Tensor:
    """Compute this rank's part of the squared norm of a tensor, float64 ``()``.

    The mean over the ranks that hold the tensor is the squared norm of the whole tensor.
    """
    parts = 1
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        parts = math.prod(
            mesh.size(axis)
            for axis, placement in enumerate(tensor.placements)
            if placement.is_shard()
        )
    return parts * local_shard(tensor).detach().double().square().sum()


def placed_as(reference: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """Place (and SPMD-type) a local tensor like the tensor that it was computed from."""
    if isinstance(reference, DTensor):
        mesh, placements = reference.device_mesh, reference.placements
        return DTensor.from_local(local, mesh, placements, run_check=False)
    if spmd.is_type_checking():
        spmd.assert_type(local, get_local_type(reference), get_partition_spec(reference))
    return local
