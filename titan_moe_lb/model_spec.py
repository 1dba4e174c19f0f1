"""A ``ModelSpec`` that balances its experts, and the arguments that made it."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from torchtitan.models.utils import validate_converter_order
from torchtitan.protocols.model import ModelConfigConverter
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.protocols.state_dict_adapter import BaseStateDictAdapter

from titan_moe_lb.converter import LoadBalanceConverter
from titan_moe_lb.forced_routing import ForcedRouting
from titan_moe_lb.losses import AuxLoss
from titan_moe_lb.parallelization import keeping_decisions, telling_schedule
from titan_moe_lb.step_hook import register_load_balancing


@dataclass
class BalancedModelSpec(ModelSpec):
    """Adds what a job config needs to build the same model with other arguments."""

    arguments: dict[str, Any] = field(default_factory=dict)
    """Arguments of the registry entry, every default filled in."""


def balanced(
    spec: ModelSpec,
    *,
    aux_losses: list[AuxLoss.Config] | None = None,
    load_balance_coeff: float | None | Literal["keep"] = "keep",
    forced_routing: ForcedRouting.Config | None = None,
    before: list[ModelConfigConverter.Config] | None = None,
) -> BalancedModelSpec:
    """Give a torchtitan model the losses and the step hook of this package.

    Args:
        spec: any torchtitan ``ModelSpec`` of a MoE model; its config is consumed.
        aux_losses: losses of every router, each with its own copy; default: none.
        load_balance_coeff: speed of the expert bias; None turns it off, "keep" leaves
            the model's own.
        forced_routing: what decides where tokens go, in a benchmark.
        before: converters of the user's own (quantization, LoRA), applied first.

    Raises:
        JobError: the model has no MoE layer, or a router that is not torchtitan's.
    """
    converter = LoadBalanceConverter.Config(
        aux_losses=aux_losses or [],
        load_balance_coeff=load_balance_coeff,
        forced_routing=forced_routing,
    )
    model = spec.model
    validate_converter_order(before or [])
    for config in [*(before or []), converter]:
        model = config.build().convert(model)
    fields = {f.name: getattr(spec, f.name) for f in dataclasses.fields(ModelSpec)}
    return BalancedModelSpec(
        **{
            **fields,
            "model": model,
            "parallelize_fn": keeping_decisions(spec.parallelize_fn),
            "pipelining_fn": spec.pipelining_fn and telling_schedule(spec.pipelining_fn),
            "post_optimizer_build_fn": register_load_balancing,
            "state_dict_adapter": _without_loss_state(spec.state_dict_adapter),
        }
    )


def _without_loss_state(
    adapter: type[BaseStateDictAdapter] | None,
) -> type[BaseStateDictAdapter] | None:
    """Keep the counts of the global-batch loss out of Hugging Face checkpoints."""
    if adapter is None:
        return None

    class Adapter(adapter):  # type: ignore[valid-type]
        def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
            weights = {k: v for k, v in state_dict.items() if ".router.aux_losses." not in k}
            return super().to_hf(weights)

    Adapter.__qualname__ = adapter.__qualname__
    return Adapter


def registry_entry(entry: Callable[..., ModelSpec]) -> Callable[..., BalancedModelSpec]:
    """Decorator of a ``model_registry`` function: keeps its arguments on the spec."""
    signature = inspect.signature(entry)

    @functools.wraps(entry)
    def with_arguments(*args, **kwargs) -> BalancedModelSpec:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        spec = entry(*bound.args, **bound.kwargs)
        assert isinstance(spec, BalancedModelSpec)
        spec.arguments = dict(bound.arguments)
        return spec

    return with_arguments
