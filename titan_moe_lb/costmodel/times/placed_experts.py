"""Placements of experts that a plan compares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from titan_moe_lb.costmodel.hardware.device import Hardware
from titan_moe_lb.costmodel.times.layer import MoELayer
from titan_moe_lb.traces.eplb import eplb
from titan_moe_lb.traces.expert_order import contiguous, greedy_in_groups


def placements(redundant_experts: Sequence[int]) -> list[tuple[str, int]]:
    """The placements under a recorded load, and the slots for copies of each."""
    return [("contiguous", 0), ("greedy", 0), *(("eplb", n) for n in redundant_experts)]


def label(placement: str, redundant_experts: int) -> str:
    """Name of a placement in tables."""
    return placement + (f" +{redundant_experts}" if redundant_experts else "")


def placed_experts(
    placement: str,
    layers: Mapping[int, MoELayer],
    known_ME: np.ndarray,
    *,
    ep_degree: int,
    hardware: Hardware,
    expert_groups: Sequence[int],
    redundant_experts: int,
) -> list[np.ndarray]:
    """Expert ids in the slots of each device ``(EP, n)``, of each layer.

    The order of the devices is free: the hottest one is another in every layer.

    Args:
        placement: "contiguous", "greedy" or "eplb".
        known_ME: tokens of each expert that it is placed for.
        expert_groups: that the greedy placement keeps together, coarse to fine.
        redundant_experts: slots for copies, all devices together.
    """
    nodes, rest = divmod(ep_degree, hardware.scale_up_domain)

    def placed(row: int, layer: MoELayer) -> np.ndarray:
        if placement == "contiguous":
            return contiguous(layer.num_experts, ep_degree)
        if placement == "greedy":
            return greedy_in_groups(known_ME[row], ep_degree, expert_groups, roll=row)
        slots = eplb(
            known_ME[row],
            num_slots=layer.num_experts + redundant_experts,
            num_devices=ep_degree,
            num_nodes=nodes if nodes and not rest else 1,
            num_groups=layer.num_groups,
        )
        return np.roll(slots, row, axis=0)

    return [placed(row, layer) for row, layer in enumerate(layers.values())]
