"""Placement of experts on the devices of an expert-parallel group, and the load of each device."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

import numpy as np

from titan_moe_lb.errors import JobError


def coarse_to_fine(numbers: Iterable[int]) -> tuple[int, ...]:
    """Sort numbers of expert groups, without duplicates and without 1, which means no groups."""
    return tuple(sorted(set(numbers) - {1}))


def contiguous(num_experts: int, ep_degree: int) -> np.ndarray:
    """Place experts in contiguous blocks, as torchtitan does.

    Returns:
        Expert ids of each device ``(EP, E / EP)``.

    Raises:
        JobError: EP does not divide E.
    """
    if num_experts % ep_degree:
        raise JobError(f"expert-parallel degree {ep_degree} does not divide {num_experts} experts")
    return np.arange(num_experts).reshape(ep_degree, -1)


def greedy(counts_E: np.ndarray, ep_degree: int) -> np.ndarray:
    """Place experts to balance a known load, without copies.

    The algorithm is the balanced packing of DeepSeek's EPLB: each expert, in descending order of
    load, goes to the least loaded device with a free slot. If a device holds one expert, the
    placement is :func:`contiguous`, because moves gain nothing.

    Args:
        counts_E: tokens of each expert ``(E,)``.
        ep_degree: number of devices; divides E.

    Returns:
        Expert ids of each device ``(EP, E / EP)``.
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
    """Place experts as :func:`greedy`, but keep groups of neighbours together.

    The groups are those of group-limited routing or of a loss. A device holds whole groups, or a
    group fills whole devices. If neither is possible, or if groups are not nested, the placement
    is :func:`contiguous`.

    Args:
        counts_E: tokens of each expert ``(E,)``.
        ep_degree: number of devices; divides E.
        groups: numbers of equal groups that divide the experts, coarse to fine.
        roll: rotation of the devices. With another number in each layer, the busiest device is
            another one in each layer.

    Returns:
        Expert ids of each device ``(EP, E / EP)``.
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
    """Compute the tokens of the busiest device over the mean of the devices.

    Args:
        counts_E: tokens of each expert ``(E,)``.
        placement_dn: expert ids of each device ``(EP, n)``.
    """
    tokens_d = counts_E[placement_dn].sum(axis=-1)
    return float(tokens_d.max() / max(tokens_d.mean(), 1e-12))


def tokens_of_experts(counts_E: np.ndarray, placement_dn: np.ndarray, total: float) -> np.ndarray:
    """Scale a measured load to another number of tokens, by device.

    Args:
        counts_E: measured tokens of each expert ``(..., E)``.
        placement_dn: expert ids of each device ``(EP, n)``. Copies of an expert share its
            tokens evenly.
        total: routed tokens to scale to: tokens x top_k.

    Returns:
        Tokens of each slot, float64 ``(..., EP, n)``; the balanced load if nothing was routed.
    """
    counts_E = np.asarray(counts_E, dtype=np.float64)
    sums = counts_E.sum(axis=-1, keepdims=True)
    share_E = np.where(sums > 0, counts_E / np.maximum(sums, 1), 1 / counts_E.shape[-1])
    copies_E = np.bincount(placement_dn.ravel(), minlength=share_E.shape[-1])
    return (share_E * total / np.maximum(copies_E, 1))[..., placement_dn]
