"""MoE load balancing for torchtitan pre-training.

The public face: ``balanced`` gives a torchtitan ``ModelSpec`` losses, a rule of the expert
bias and telemetry. Each name is imported when it is first used, so that importing the
package is instant and the host backend can come before torchtitan.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_MODULES = {
    "errors": ("JobError",),
    "model_spec": ("balanced",),
    "losses": (
        "AuxLoss",
        "BatchWiseAuxLoss",
        "GlobalBatchAuxLoss",
        "LogitsLoss",
        "RouterZLoss",
        "SequenceWiseAuxLoss",
        "SumsLoss",
    ),
    "expert_bias": ("ExpertBias", "FrozenBias", "SignBias"),
    "forced_routing": (
        "BiasedNormal",
        "Burst",
        "DealtRouting",
        "DrawnRouting",
        "ForcedRouting",
        "HotExperts",
        "HotRank",
        "HotShare",
        "Ragged",
        "RandomBalanced",
        "Replay",
        "Rotating",
        "RoundRobin",
        "ZeroLoad",
    ),
    "own_loop.attach": ("Balance", "attach"),
    "own_loop.build": ("BuiltModel", "build_model"),
    "own_loop.routing_replay": ("RoutingReplay",),
    "own_loop.transformers_backend": ("balanced_transformers",),
    "train": ("trainer_config",),
    "value_schedule": ("Change",),
    "telemetry.metric": ("Metric", "Reduction"),
    "telemetry.metrics": ("LoadBalanceMetricsProcessor",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = ["__version__", *_HOME]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _HOME[name] != "errors":  # the only one without torchtitan
        importlib.import_module(f"{__name__}.upstream.cpu").prepare()
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
