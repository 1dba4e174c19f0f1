"""MoE load balancing for torchtitan pre-training.

The public face: ``balanced`` gives a torchtitan ``ModelSpec`` losses, a rule of the expert
bias and telemetry. Each name is imported when it is first used, so that importing the
package is instant and the host backend can come before torchtitan.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_ROOMS = {
    "errors": ("JobError",),
    "model_spec": ("balanced",),
    "losses": (
        "AuxLoss",
        "BatchWiseAuxLoss",
        "GlobalBatchAuxLoss",
        "RouterZLoss",
        "SequenceWiseAuxLoss",
    ),
    "expert_bias": ("ExpertBias", "FrozenBias", "SignBias"),
    "forced_routing": (
        "BiasedNormal",
        "ForcedRouting",
        "HotRank",
        "RandomBalanced",
        "Replay",
        "RoundRobin",
    ),
    "value_schedule": ("Change",),
    "telemetry.metrics": ("LoadBalanceMetricsProcessor",),
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = ["__version__", *_HOME]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
