"""Placement with copies of hot experts for a known load: the algorithm of DeepSeek's EPLB.

It predicts the gain of copies. No job can train with them, because torchtitan's dispatchers
support one place per expert.

Source: github.com/deepseek-ai/EPLB.
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
    """Place experts and copies of the hot ones on devices.

    If the nodes divide the groups, the placement is hierarchical: each group goes to a node, and
    the copies of an expert stay on its node. Otherwise any copy can go to any device.

    Args:
        load_E: known load of each expert ``(E,)``.
        num_slots: E plus the number of copies.
        num_devices: devices of the expert-parallel group.
        num_nodes: nodes of these devices.
        num_groups: groups of experts in group-limited routing.

    Returns:
        Expert ids in the slots of each device ``(num_devices, num_slots / num_devices)``.

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
    """Assign an expert to each slot: each once, then repeatedly the one with most load per copy."""
    slots = list(range(len(load_E)))
    copies_E = np.ones(len(load_E))
    while len(slots) < num_slots:
        hottest = int(np.argmax(load_E / copies_E))
        slots.append(hottest)
        copies_E[hottest] += 1
    return np.array(slots)
