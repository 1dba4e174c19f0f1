"""Copies of hot experts, placed for a known load: the algorithm of DeepSeek's EPLB.

Source: github.com/deepseek-ai/EPLB. torchtitan's dispatchers know one place for each
expert, so that this answers what copies would buy; nothing here trains with them.
"""

from __future__ import annotations

import numpy as np

from titan_moe_lb.errors import JobError
from titan_moe_lb.traces.expert_order import greedy


def eplb(
    load_E: np.ndarray,
    *,
    num_slots: int,
    num_devices: int,
    num_nodes: int = 1,
    num_groups: int = 1,
) -> np.ndarray:
    """Expert ids in the slots of each device ``(num_devices, num_slots / num_devices)``.

    Hierarchical where the nodes divide the groups: groups of experts go to nodes, the copies
    of an expert stay on its node. Otherwise global: any copy on any device.

    Args:
        load_E: known load of each expert ``(E,)``.
        num_slots: E and the copies: every expert has one slot, the hot ones have more.
        num_devices: of the expert-parallel group.
        num_nodes: nodes that these devices are on.
        num_groups: of experts, those of group-limited routing.

    Raises:
        JobError: fewer slots than experts, or slots, devices and groups do not divide evenly.
    """
    if num_groups % num_nodes:
        num_nodes = num_groups = 1
    if num_slots < len(load_E) or num_slots % num_devices:
        raise JobError(
            f"{num_slots} slots cannot hold {len(load_E)} experts on {num_devices} devices: take "
            f"a multiple of {num_devices} that is at least {len(load_E)}"
        )
    if len(load_E) % num_groups or num_devices % num_nodes:
        raise JobError(
            f"{len(load_E)} experts in {num_groups} groups on {num_devices} devices of "
            f"{num_nodes} nodes do not divide evenly"
        )
    load_E = np.asarray(load_E, dtype=np.float64)
    groups = np.arange(len(load_E)).reshape(num_groups, -1)
    placed = []
    for groups_here in greedy(load_E[groups].sum(axis=1), num_nodes):
        experts = groups[groups_here].ravel()
        slots = experts[_slots(load_E[experts], num_slots // num_nodes)]
        load_of_slot = load_E[slots] / np.bincount(slots)[slots]
        placed.append(slots[greedy(load_of_slot, num_devices // num_nodes)])
    return np.concatenate(placed)


def _slots(load_E: np.ndarray, num_slots: int) -> np.ndarray:
    """The expert of each slot: every one once, then always the one with most load a copy."""
    slots = list(range(len(load_E)))
    copies_E = np.ones(len(load_E))
    while len(slots) < num_slots:
        hottest = int(np.argmax(load_E / copies_E))
        slots.append(hottest)
        copies_E[hottest] += 1
    return np.array(slots)
