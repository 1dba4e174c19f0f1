"""Caches of torch and torchtitan that outlive a process group."""

from __future__ import annotations

from torch.distributed.tensor import _redistribute
from torch.distributed.tensor._collective_utils import MeshTopoInfo
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torchtitan.distributed import spmd_types as spmd

from titan_moe_lb.upstream.mesh_caches import forget_meshes


def forget() -> None:
    """Clear every cache of meshes, so that their groups end.

    gloo has a thread for each group that wakes a hundred times a second
    (``gloo/transport/tcp/loop.cc``): after a hundred jobs of four ranks they took two cores.
    """
    vars(spmd._MESH_TLS).clear()
    forget_meshes()
    _redistribute.clear_redistribute_planner_cache()
    _redistribute._gen_transform_infos.cache_clear()
    MeshTopoInfo.build_from_mesh.cache_clear()
    ShardingPropagator._propagate_tensor_meta_cached.cache_clear()
