"""MoE load balancing for torchtitan.

The public face: ``balanced`` gives a torchtitan ``ModelSpec`` losses, a rule of the expert
bias and telemetry. Each name is imported when it is first used, so that importing the
package is instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_MODULES = {
    "errors": ("JobError",),
    "model_spec": ("balanced",),
    "losses": (
        "AuxLoss",
        "BatchWiseAuxLoss",
        "CommunicationLoss",
        "DeviceLevelLoss",
        "EntropyLoss",
        "GlobalBatchAuxLoss",
        "ImportanceLoss",
        "LogitsLoss",
        "RouterZLoss",
        "SequenceWiseAuxLoss",
        "SumsLoss",
    ),
    "expert_bias": (
        "ExpertBias",
        "FrozenBias",
        "MomentumBias",
        "ProportionalBias",
        "QuantileBias",
        "QuantileTrendBias",
        "SignBias",
    ),
    "forced_routing": (
        "BiasedNormal",
        "Burst",
        "TokenIndexRouting",
        "RandomRouting",
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


if TYPE_CHECKING:  # for type checkers and editors, the same names
    # isort: off
    from titan_moe_lb.errors import JobError as JobError
    from titan_moe_lb.balancing.expert_bias import (
        ExpertBias as ExpertBias,
        FrozenBias as FrozenBias,
        MomentumBias as MomentumBias,
        ProportionalBias as ProportionalBias,
        QuantileBias as QuantileBias,
        QuantileTrendBias as QuantileTrendBias,
        SignBias as SignBias,
    )
    from titan_moe_lb.balancing.forced_routing import (
        BiasedNormal as BiasedNormal,
        Burst as Burst,
        TokenIndexRouting as TokenIndexRouting,
        RandomRouting as RandomRouting,
        ForcedRouting as ForcedRouting,
        HotExperts as HotExperts,
        HotRank as HotRank,
        HotShare as HotShare,
        Ragged as Ragged,
        RandomBalanced as RandomBalanced,
        Replay as Replay,
        Rotating as Rotating,
        RoundRobin as RoundRobin,
        ZeroLoad as ZeroLoad,
    )
    from titan_moe_lb.balancing.losses import (
        AuxLoss as AuxLoss,
        BatchWiseAuxLoss as BatchWiseAuxLoss,
        CommunicationLoss as CommunicationLoss,
        DeviceLevelLoss as DeviceLevelLoss,
        EntropyLoss as EntropyLoss,
        GlobalBatchAuxLoss as GlobalBatchAuxLoss,
        ImportanceLoss as ImportanceLoss,
        LogitsLoss as LogitsLoss,
        RouterZLoss as RouterZLoss,
        SequenceWiseAuxLoss as SequenceWiseAuxLoss,
        SumsLoss as SumsLoss,
    )
    from titan_moe_lb.wiring.model_spec import balanced as balanced
    from titan_moe_lb.own_loop.attach import Balance as Balance, attach as attach
    from titan_moe_lb.own_loop.build import BuiltModel as BuiltModel, build_model as build_model
    from titan_moe_lb.own_loop.routing_replay import RoutingReplay as RoutingReplay
    from titan_moe_lb.own_loop.transformers_backend import (
        balanced_transformers as balanced_transformers,
    )
    from titan_moe_lb.telemetry.metric import Metric as Metric, Reduction as Reduction
    from titan_moe_lb.telemetry.metrics_processor import (
        LoadBalanceMetricsProcessor as LoadBalanceMetricsProcessor,
    )
    from titan_moe_lb.run.train import trainer_config as trainer_config
    from titan_moe_lb.balancing.value_schedule import Change as Change
else:

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
