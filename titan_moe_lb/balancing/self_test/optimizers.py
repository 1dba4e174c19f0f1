"""Gates in the optimizers of a loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn


def each(optimizer: Any) -> list[Any]:
    """Return the optimizers of a sequence, or of one optimizer; empty for None."""
    if optimizer is None:
        return []
    return list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]


def learning_rates(optimizers: list[Any]) -> dict[int, float]:
    """Return the initial learning rate of each parameter, by its ``id``.

    A scheduler may have set the present one to 0 for a warm-up. torchtitan's container has its
    optimizers in ``optimizers``.
    """
    single = [one for given in optimizers for one in getattr(given, "optimizers", [given])]
    return {
        id(parameter): float(group.get("initial_lr", group.get("lr", 0.0)))
        for one in single
        for group in one.param_groups
        for parameter in group["params"]
    }


def gate_state(gate: nn.Module, optimizers: list[Any]) -> tuple[bool | None, float | None]:
    """Return whether all trained parameters of a gate are in an optimizer, and its learning rate."""
    trained = [p for p in gate.parameters() if p.requires_grad]
    if not optimizers or not trained:
        return None, None
    rates = learning_rates(optimizers)
    known = [rates[id(p)] for p in trained if id(p) in rates]
    return len(known) == len(trained), max(known, default=None)
