"""Parallel layout of a job as plain numbers, known before any process group exists."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from titan_moe_lb.errors import JobError


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Degree of every kind of parallelism, under torchtitan's names for the mesh axes."""

    world_size: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    spmd_backend: str = "spmd_types"

    @classmethod
    def of(cls, parallelism: Any, world_size: int) -> Layout:
        """Resolve ``[parallelism]``, with ``data_parallel_shard_degree = -1`` filled in."""
        names = {
            "dp_replicate": "data_parallel_replicate_degree",
            "cp": "context_parallel_degree",
            "tp": "tensor_parallel_degree",
            "pp": "pipeline_parallel_degree",
            "dp_shard": "data_parallel_shard_degree",
            "ep": "expert_parallel_degree",
        }
        degrees = {axis: getattr(parallelism, name) for axis, name in names.items()}
        fills_up = degrees["dp_shard"] == -1
        for axis, degree in degrees.items():
            if degree < 1 and not (axis == "dp_shard" and fills_up):
                raise JobError(f"parallelism.{names[axis]} is {degree}; it must be at least 1")
        fixed = {axis: n for axis, n in degrees.items() if axis != "ep" and n != -1}
        product = math.prod(fixed.values())
        if world_size % product or (not fills_up and world_size != product):
            asked = " x ".join(f"{names[axis]} {n}" for axis, n in fixed.items() if n > 1)
            multiple = "a multiple of " if fills_up else ""
            raise JobError(
                f"the job runs in {world_size} process(es) but its parallelism ({asked or 'none'}) "
                f"needs {multiple}{product}: set NGPU={product} (--ranks of a plan), or change [parallelism]"
            )
        if fills_up:
            degrees["dp_shard"] = world_size // product
        layout = cls(world_size=world_size, spmd_backend=parallelism.spmd_backend, **degrees)
        if layout.widest_ep % layout.ep:
            raise JobError(
                f"parallelism.expert_parallel_degree {layout.ep} must divide "
                f"data_parallel_shard x context_parallel x tensor_parallel = "
                f"{layout.dp_shard} x {layout.cp} x {layout.tp}"
            )
        return layout

    @classmethod
    def of_dims(cls, dims: Any) -> Layout:
        """Read the degrees of torchtitan's ``ParallelDims``, which has the same names."""
        return cls(**{one.name: getattr(dims, one.name) for one in dataclasses.fields(cls)})

    @property
    def data_ranks(self) -> int:
        """Ranks that read different rows of the global batch."""
        return self.dp_replicate * self.dp_shard

    @property
    def widest_ep(self) -> int:
        """Largest expert-parallel degree: the ranks that hold one copy of a pipeline stage."""
        return self.dp_shard * self.cp * self.tp

    @property
    def sequence_shards(self) -> int:
        """Ranks that share one row of a router."""
        return self.cp * (self.tp if self.ep > 1 else 1)

    @property
    def stage_ranks(self) -> int:
        """Ranks of one pipeline position."""
        return self.world_size // self.pp

    def metrics_rank(self, schedule: str) -> int:
        """Return the global rank that sees the loss: the first of the last pipeline stage.

        A V-shaped schedule places the last stage on the first pipeline rank.
        """
        if schedule in ("ZBVZeroBubble", "DualPipeV"):
            return 0
        return self.stage_ranks * (self.pp - 1)
