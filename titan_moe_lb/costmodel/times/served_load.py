"""Loads of a deployment: tokens of each expert, and the placement of the experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from titan_moe_lb.costmodel.loads.expert_load import expert_load
from titan_moe_lb.costmodel.loads.recorded import RecordedLoads
from titan_moe_lb.costmodel.times.moe_layer import MoELayer
from titan_moe_lb.costmodel.times.placed_experts import label, placements


@dataclass(frozen=True, kw_only=True)
class ServedLoad:
    """Load of the experts under one placement."""

    name: str
    """Name in tables."""
    description: str
    """Phrase for sentences."""
    counts_NME: np.ndarray
    """Tokens of each expert under N loads. Only their proportions matter."""
    placement: str = "contiguous"
    expert_groups: tuple[int, ...] = ()
    redundant_experts: int = 0


def two_level_loads(
    layers: Sequence[MoELayer], factors: Sequence[float], num_hot_experts: int
) -> list[ServedLoad]:
    """Build a two-level load for each imbalance factor; the first experts are the hot ones."""
    loads = []
    for factor in factors:
        counts_ME = []
        for layer in layers:
            load = expert_load(
                num_experts=layer.num_experts,
                top_k=layer.top_k,
                num_tokens=1,
                imbalance_factor=factor,
                num_hot_experts=num_hot_experts,
            )
            counts_E = np.full(layer.num_experts, load.remaining_tokens)
            counts_E[:num_hot_experts] = load.hot_tokens
            counts_ME.append(counts_E)
        name = f"{counts_ME[0].max() / counts_ME[0].mean():.2f}"
        description = "balance" if name == "1.00" else f"an imbalance of {name}"
        loads.append(
            ServedLoad(name=name, description=description, counts_NME=np.stack(counts_ME)[None])
        )
    return loads


def recorded_loads(recorded: RecordedLoads, redundant_experts: Sequence[int]) -> list[ServedLoad]:
    """Build the load of a run's last steps, once for each placement of the experts."""
    counts_ME = recorded.known(slice(-recorded.window, None))
    return [
        ServedLoad(
            name=label(placement, redundant),
            description="the load of the run's last steps",
            counts_NME=counts_ME[None],
            placement=placement,
            expert_groups=recorded.expert_groups,
            redundant_experts=redundant,
        )
        for placement, redundant in placements(redundant_experts)
    ]
