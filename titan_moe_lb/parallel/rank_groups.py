"""Process groups of a rank by their role in routing; the only reader of torchtitan's meshes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.distributed as dist


class Axis(NamedTuple):
    """Ranks of one mesh axis; by default this rank alone."""

    rank: int = 0
    """Number of this rank on the axis."""

    size: int = 1

    group: dist.ProcessGroup | None = None
    """Process group; None for a rank that is alone."""


@dataclass(frozen=True, kw_only=True)
class RankGroups:
    """Process groups of a rank, as routers, losses and step hooks use them.

    A copy of a model shares the groups of the original: process groups cannot be copied.
    """

    batch: Axis = Axis()
    """Data-parallel ranks: each has different rows."""

    context: Axis = Axis()
    """Context-parallel ranks: each has a different part of the same rows."""

    loss: Axis = Axis()
    """Data and context parallel ranks together."""

    tensor: Axis = Axis()
    """Tensor-parallel ranks."""

    experts: Axis = Axis()
    """Expert-parallel ranks, which are successive ranks among those that route tokens."""

    stages: Axis = Axis()
    """Pipeline ranks."""

    token_replicas: int = 1
    """Ranks that route the same tokens and whose gradients are summed."""

    @classmethod
    def of(cls, dims: Any) -> RankGroups:
        """Read the meshes of a torchtitan ``ParallelDims``.

        Under TP without EP, spmd_types keeps plain tensors, whose gradient on a replicated axis
        is a partial sum. The gradient of a DTensor is whole on every rank.
        """

        def axis(name: str, enabled: bool) -> Axis:
            if not enabled:
                return Axis()
            mesh = dims.get_mesh(name)
            return Axis(mesh.get_local_rank(), mesh.size(), mesh.get_group())

        replicas = dims.spmd_backend == "spmd_types" and not dims.ep_enabled
        return cls(
            batch=axis("batch", dims.dp_enabled),
            context=axis("cp", dims.cp_enabled),
            loss=axis("loss", dims.dp_cp_enabled),
            tensor=axis("tp", dims.tp_enabled),
            experts=axis("ep", dims.ep_enabled),
            stages=axis("pp", dims.pp_enabled),
            token_replicas=dims.tp if replicas else 1,
        )

    @classmethod
    def each_alone(cls) -> RankGroups:
        """Create the groups of processes that each have the whole model and different rows."""
        axis = Axis()
        if dist.is_initialized() and dist.get_world_size() > 1:
            axis = Axis(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
        return cls(batch=axis, loss=axis)

    def __deepcopy__(self, _memo: object) -> RankGroups:
        return self

    @property
    def _token_shards(self) -> Axis:
        """Ranks that share the tokens of a row before the gate.

        With EP, torchtitan splits the tokens over TP ranks. Without EP, every TP rank routes the
        same tokens.
        """
        return self.tensor if self.experts.size > 1 else Axis()

    @property
    def tokens(self) -> list[dist.ProcessGroup]:
        """Groups whose ranks route different tokens."""
        return _groups(self.loss, self._token_shards)

    @property
    def sequence(self) -> list[dist.ProcessGroup]:
        """Groups whose ranks route different tokens of the same rows."""
        return _groups(self.context, self._token_shards)

    @property
    def loop(self) -> list[dist.ProcessGroup]:
        """Groups over which the ranks of a training loop compare their numbers."""
        return [*self.tokens, *_groups(self.stages)]

    @property
    def sequence_shards(self) -> int:
        """Ranks that share a router's sequence."""
        return self.context.size * self._token_shards.size

    @property
    def token_ranks(self) -> Axis:
        """Position of this rank among all that route different tokens, without a process group."""
        shards = self._token_shards
        return Axis(self.loss.rank * shards.size + shards.rank, self.loss.size * shards.size)

    def token_slices(self, length: int, load_balancer: str | None) -> list[tuple[int, int]]:
        """List the parts of a row that a router of this rank routes, in order.

        Context parallelism's "headtail" balancer assigns the r-th slice of 2 n and the r-th last to
        rank r of n. Tensor parallelism then splits the part of a rank.

        Returns:
            (start, length) of each part.
        """
        rank, size, _group = self.context
        if size > 1 and load_balancer == "headtail":
            part = length // (2 * size)
            pieces = [(rank * part, part), ((2 * size - 1 - rank) * part, part)]
        else:
            part = length // size
            pieces = [(rank * part, part)]
        return _share(pieces, self._token_shards)


def _groups(*axes: Axis) -> list[dist.ProcessGroup]:
    return [axis.group for axis in axes if axis.group is not None]


def _share(pieces: list[tuple[int, int]], ranks: Axis) -> list[tuple[int, int]]:
    """Select this rank's equal share of some positions, in their order."""
    share = sum(length for _start, length in pieces) // ranks.size
    skip, part = ranks.rank * share, []
    for start, length in pieces:
        taken = max(0, min(length - skip, share))
        if taken > 0:
            part.append((start + max(skip, 0), taken))
            share -= taken
        skip = max(skip - length, 0)
    return part
