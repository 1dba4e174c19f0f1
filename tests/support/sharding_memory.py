"""How DTensor splits an operator, remembered from one job of a rank to the next.

DTensor works it out on fake tensors, which is a third of a job of two steps. Its own caches hold the
meshes of a job, and with them the process groups, and are cleared after each (``gone_meshes.py``).
"""

from __future__ import annotations

import copy
from dataclasses import replace

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor._op_schema import OpSchema, OutputSharding
from torch.distributed.tensor._sharding_prop import LocalLRUCache, _are_we_tracing
from torch.utils._pytree import tree_leaves, tree_map_only

_known: dict[OpSchema, OutputSharding] = {}


def begin() -> None:
    """Remember in this process from now on."""
    propagator = DTensor._op_dispatcher.sharding_propagator
    work_out = propagator.propagate_op_sharding_non_cached

    def look_up(schema: OpSchema) -> OutputSharding:
        if _are_we_tracing():
            return work_out(schema)
        if schema not in _known:
            _known[schema] = work_out(schema)
        return _on_meshes_of(schema, _known[schema])

    propagator.propagate_op_sharding_non_cached = look_up
    propagator.propagate_op_sharding = LocalLRUCache(look_up)


def let_go_of_groups() -> None:
    """Drop the process groups of every mesh that is remembered; meshes of two jobs are equal."""
    for schema, known in _known.items():
        inputs = known.redistribute_schema
        more = () if inputs is None else (inputs.args_schema, inputs.kwargs_schema)
        for leaf in tree_leaves(
            (schema.args_schema, schema.kwargs_schema, known.output_spec, more)
        ):
            if isinstance(leaf, DTensorSpec):
                leaf.mesh._pg_registry.clear()
                leaf.mesh._get_root_mesh()._pg_registry.clear()


def _meshes(schema: OpSchema) -> dict[DeviceMesh, DeviceMesh]:
    """Each mesh of an operator's tensors by itself: one of another job is equal to it."""
    leaves = tree_leaves((schema.args_schema, schema.kwargs_schema))
    return {leaf.mesh: leaf.mesh for leaf in leaves if isinstance(leaf, DTensorSpec)}


def _on_meshes_of(schema: OpSchema, known: OutputSharding) -> OutputSharding:
    """A copy of what is known, on the meshes of this job."""
    meshes = _meshes(schema)

    def moved(spec: DTensorSpec) -> DTensorSpec:
        spec = copy.copy(spec)
        spec.mesh = meshes.get(spec.mesh, spec.mesh)
        return spec

    output_spec = tree_map_only(DTensorSpec, moved, known.output_spec)
    inputs = known.redistribute_schema
    if inputs is not None:
        args, kwargs = tree_map_only(DTensorSpec, moved, (inputs.args_schema, inputs.kwargs_schema))
        inputs = OpSchema(inputs.op, args, kwargs, inputs.schema_info)
    return replace(known, output_spec=output_spec, redistribute_schema=inputs)
