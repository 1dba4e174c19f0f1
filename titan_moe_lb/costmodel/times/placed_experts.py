"""Placements of experts that a plan compares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from titan_moe_lb.costmodel.hardware.device import Hardware
from titan_moe_lb.costmodel.times.moe_layer import MoELayer
from titan_moe_lb.traces.eplb import eplb
from titan_moe_lb.traces.expert_order import contiguous, greedy_in_groups


def placements(redundant_experts: Sequence[int]) -> list[tuple[str, int]]:
    """List the placements for a recorded load, each with its slots for copies."""
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
    """Place experts: their ids in the slots of each device ``(EP, n)``, for each layer.

    Greedy and EPLB placements rotate the devices by one for each layer. Otherwise one device
    would be the hottest in every layer.

    Args:
        placement: "contiguous", "greedy" or "eplb".
        layers: MoE layers by number.
        known_ME: tokens of each expert to place for.
        ep_degree: number of devices.
        hardware: the device, whose scale-up domain is a node for EPLB.
        expert_groups: numbers of equal groups of neighbouring experts that the greedy placement
            keeps together, coarse to fine.
        redundant_experts: slots for copies, summed over the devices.

    Raises:
        JobError: the devices do not divide the experts and their copies.
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
