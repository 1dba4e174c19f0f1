"""Parts of a layer that do not learn: its gate, its expert bias, its losses."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from titan_moe_lb.balancing.losses.base import AuxLoss
from titan_moe_lb.balancing.router import LoadBalancedRouter, routers_of
from titan_moe_lb.errors import JobError

Layers = int | str | list[int | str]
"""Layers of a model: a number as in the metrics, a range such as ``"1-3"``, ``"mtp"`` for the
layers of multi-token prediction, ``"all"``, or a list of these."""


@dataclass(kw_only=True, slots=True)
class Freeze:
    """Layers whose parts are frozen. Tokens are counted in every layer."""

    gate: Layers = field(default_factory=list)
    """Layers whose gate keeps its weights. Their losses are off, because they would act on the
    layers before through the input of the gate."""

    bias: Layers = field(default_factory=list)
    """Layers whose expert bias is applied, and keeps its values."""

    losses: Layers = field(default_factory=list)
    """Layers whose losses are off."""

    def resolve(self, numbers: Mapping[str, int]) -> dict[str, set[int]]:
        """Return the numbers of the frozen layers of each part."""
        parts = {"gate": self.gate, "bias": self.bias, "losses": self.losses}
        found = {part: _select(f"freeze.{part}", layers, numbers) for part, layers in parts.items()}
        return found | {"losses": found["losses"] | found["gate"]}


def _select(key: str, layers: Layers, numbers: Mapping[str, int]) -> set[int]:
    selected: set[int] = set()
    for item in layers if isinstance(layers, list) else [layers]:
        bounds = re.fullmatch(r"(\d+)(?:-(\d+))?", str(item))
        if item == "all":
            found = set(numbers.values())
        elif item == "mtp":
            found = {n for name, n in numbers.items() if not name.startswith("layers.")}
        elif bounds:
            first, last = int(bounds[1]), int(bounds[2] or bounds[1])
            found = {n for n in numbers.values() if first <= n <= last}
            if last > max(numbers.values()):
                found = set()
        else:
            raise JobError(
                f'{key} has {item!r}: name layers by number, as a range like "1-3", as "mtp" or '
                'as "all"'
            )
        if not found:
            known = ", ".join(map(str, sorted(numbers.values())))
            raise JobError(f"{key} names layer {item}; the MoE layers of the model are {known}")
        selected |= found
    return selected


def freeze_gates(model: nn.Module) -> None:
    """Freeze the weights of the gates that their routers' configs name, adapters included."""
    for router in routers_of([model]):
        if "gate" in router.config.frozen:
            router.gate.requires_grad_(False)


def applied_losses(routers: Sequence[LoadBalancedRouter.Config]) -> list[AuxLoss.Config]:
    """Return the losses of the layers in which they are on, which are alike; empty without one."""
    return next((router.aux_losses for router in routers if "losses" not in router.frozen), [])


def layers_by_part(routers: Sequence[LoadBalancedRouter.Config]) -> dict[str, list[int]]:
    """Return the layers of each part that does not learn; parts that learn everywhere are left out.

    A bias is frozen too if its rule does not move it.
    """
    found: dict[str, list[int]] = {}
    for router in routers:
        still = router.expert_bias is not None and not router.expert_bias._owner.moves
        for part in sorted(router.frozen | ({"bias"} if still else set())):
            found.setdefault(part, []).append(router.layer)
    return found
