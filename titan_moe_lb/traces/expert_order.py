"""Orders of the experts over the devices of expert parallelism, and the load of each device."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

import numpy as np

from titan_moe_lb.errors import JobError


def coarse_to_fine(numbers: Iterable[int]) -> tuple[int, ...]:
    """Sort numbers of groups of neighbours that stay together; 1 means no groups."""
    return tuple(sorted(set(numbers) - {1}))


def contiguous(num_experts: int, ep_degree: int) -> np.ndarray:
    """Expert ids of each device ``(EP, E / EP)``: in blocks, as torchtitan places them.

    Raises:
        JobError: EP does not divide E.
    """
    if num_experts % ep_degree:
        raise JobError(f"expert-parallel degree {ep_degree} does not divide {num_experts} experts")
    return np.arange(num_experts).reshape(ep_degree, -1)


def greedy(counts_E: np.ndarray, ep_degree: int) -> np.ndarray:
    """Expert ids of each device ``(EP, E / EP)``, placed to balance a known load.

    The most loaded expert first, always to the least loaded device that has room: what
    moving experts, without copying any, can buy (the balanced packing of DeepSeek's EPLB).
    Where a device holds one expert there is nothing to gain, and none moves.

    Args:
        counts_E: tokens of each expert ``(E,)``.
    """
    blocks = contiguous(len(counts_E), ep_degree)
    if blocks.shape[1] == 1:
        return blocks
    placed: list[list[int]] = [[] for _ in range(ep_degree)]
    with_room = [(0.0, device) for device in range(ep_degree)]
    for expert in np.argsort(-counts_E, kind="stable").tolist():
        load, device = heapq.heappop(with_room)
        placed[device].append(expert)
        if len(placed[device]) < blocks.shape[1]:
            heapq.heappush(with_room, (load + float(counts_E[expert]), device))
    return np.array(placed)


def greedy_in_groups(
    counts_E: np.ndarray, ep_degree: int, groups: Sequence[int], *, roll: int = 0
) -> np.ndarray:
    """Expert ids of each device ``(EP, E / EP)``, as :func:`greedy`, where groups of neighbours
    stay together: those of group-limited routing, or of a loss.

    A device gets whole groups, or a group gets whole devices. Where neither goes, or groups cut
    across each other, none moves.

    Args:
        groups: into how many equal groups the experts are divided, coarse to fine.
        roll: which device is the first is free; a number for each layer, so that the busiest
            one is another in every layer.
    """
    if not groups:
        return np.roll(greedy(counts_E, ep_degree), roll, axis=0)
    coarse, *finer = groups
    nested = all(number % coarse == 0 for number in finer)
    experts_Gn = contiguous(len(counts_E), coarse)
    if nested and coarse % ep_degree == 0:
        placed = np.roll(greedy(counts_E[experts_Gn].sum(axis=-1), ep_degree), roll, axis=0)
        return experts_Gn[placed].reshape(ep_degree, -1)
    if nested and ep_degree % coarse == 0:
        inside = ep_degree // coarse, [number // coarse for number in finer]
        return np.concatenate(
            [
                experts_n[greedy_in_groups(counts_E[experts_n], *inside, roll=roll)]
                for experts_n in experts_Gn
            ]
        )
    return contiguous(len(counts_E), ep_degree)


def overload(counts_E: np.ndarray, placement_dn: np.ndarray) -> float:
    """Tokens of the busiest device over the balanced ones.

    Args:
        counts_E: tokens of each expert ``(E,)``.
        placement_dn: expert ids of each device ``(EP, n)``.
    """
    tokens_d = counts_E[placement_dn].sum(axis=-1)
    return float(tokens_d.max() / max(tokens_d.mean(), 1e-12))


def tokens_of_experts(counts_E: np.ndarray, placement_dn: np.ndarray, total: float) -> np.ndarray:
    """The load by device, scaled to another number of tokens.

    Args:
        counts_E: measured tokens of each expert ``(..., E)``.
        placement_dn: expert ids of each device ``(EP, n)``. Copies of an expert share its
            tokens evenly.
        total: T K, routed tokens to scale to.

    Returns:
        ``(..., EP, n)`` float64. Where nothing was routed, the balanced load.
    """
    counts_E = np.asarray(counts_E, dtype=np.float64)
    sums = counts_E.sum(axis=-1, keepdims=True)
    share_E = np.where(sums > 0, counts_E / np.maximum(sums, 1), 1 / counts_E.shape[-1])
    copies_E = np.bincount(placement_dn.ravel(), minlength=share_E.shape[-1])
    return (share_E * total / np.maximum(copies_E, 1))[..., placement_dn]
