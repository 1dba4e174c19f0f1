"""``ModelSpec`` with balanced experts, and the arguments that built it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from torchtitan.components.optimizer import register_moe_load_balancing_hook
from torchtitan.models.utils import validate_converter_order
from torchtitan.protocols.model import ModelConfigConverter
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.protocols.state_dict_adapter import BaseStateDictAdapter

from titan_moe_lb.balancing.anticipatory_routing import Anticipatory
from titan_moe_lb.balancing.checkpointing import announcing_schedule, saving_decisions
from titan_moe_lb.balancing.expert_bias import ExpertBias
from titan_moe_lb.balancing.forced_routing import ForcedRouting
from titan_moe_lb.balancing.freezing import Freeze
from titan_moe_lb.balancing.losses import AuxLoss
from titan_moe_lb.balancing.router import router_configs
from titan_moe_lb.balancing.score_functions import ScoreFunction
from titan_moe_lb.wiring.converter import BuildHooks, LoadBalanceConverter


@dataclass
class BalancedModelSpec(ModelSpec):
    """``ModelSpec`` from which a job config builds the same model with other arguments."""

    arguments: dict[str, Any] = field(default_factory=dict)
    """Arguments of the registry entry, including defaults; without an entry, the arguments of
    :func:`balanced`."""

    routing: Anticipatory.Config | None = None
    """Experts of older parameters; None: each forward chooses its own."""


def balanced(
    spec: ModelSpec,
    *,
    aux_losses: list[AuxLoss.Config] | None = None,
    expert_bias: ExpertBias.Config | None | Literal["keep"] = "keep",
    forced_routing: ForcedRouting.Config | None = None,
    routing: Anticipatory.Config | None = None,
    score_func: ScoreFunction | Literal["keep"] = "keep",
    freeze: Freeze | None = None,
    converters: list[ModelConfigConverter.Config] | None = None,
) -> BalancedModelSpec:
    """Add the losses and the step hook of this package to a torchtitan model.

    A ``post_optimizer_build_fn`` of the spec runs before ours. torchtitan's own update of the
    expert bias does not run, because ours replaces it.

    Args:
        spec: any torchtitan ``ModelSpec`` of a MoE model, whose config is changed. A balanced spec
            is balanced anew.
        aux_losses: losses of every router, each with its own copy; None or an empty list
            for none.
        expert_bias: rule that moves the bias of the choice; None for no bias, "keep" for the
            rule that the model has: torchtitan's is the sign rule.
        forced_routing: strategy that chooses the experts, in a benchmark.
        routing: anticipatory routing of a job file; None for none.
        score_func: function from logits to scores; "keep" for the model's own.
        freeze: gates, biases and losses that do not learn, by layer; None for none.
        converters: the user's own converters (quantization, LoRA), applied first.

    Raises:
        JobError: the model has no MoE layer, or a router that is not torchtitan's; a layer to
            freeze does not exist.
    """
    converter = LoadBalanceConverter.Config(
        aux_losses=aux_losses or [],
        expert_bias=expert_bias,
        forced_routing=forced_routing,
        score_func=score_func,
        freeze=freeze,
    )
    model = spec.model
    validate_converter_order(converters or [])
    for config in [*(converters or []), converter]:
        model = config.build().convert(model)
    for router in router_configs(model).values():
        router.is_anticipatory = routing is not None
    arguments = {
        "aux_losses": aux_losses,
        "expert_bias": expert_bias,
        "forced_routing": forced_routing,
        "routing": routing,
        "score_func": score_func,
        "freeze": freeze,
    }
    if isinstance(spec, BalancedModelSpec):
        return dataclasses.replace(  # type: ignore[call-arg]
            spec, model=model, arguments=arguments, routing=routing
        )
    # torchtitan's own update would move the same bias a second time.
    replaced = spec.post_optimizer_build_fn is register_moe_load_balancing_hook
    return BalancedModelSpec(
        name=spec.name,
        flavor=spec.flavor,
        model=model,
        parallelize_fn=saving_decisions(spec.parallelize_fn),
        pipelining_fn=spec.pipelining_fn and announcing_schedule(spec.pipelining_fn),
        post_optimizer_build_fn=BuildHooks(own=None if replaced else spec.post_optimizer_build_fn),
        state_dict_adapter=_without_balance_state(spec.state_dict_adapter),
        arguments=arguments,
        routing=routing,
    )


def _without_balance_state(
    adapter: type[BaseStateDictAdapter] | None,
) -> type[BaseStateDictAdapter] | None:
    """Leave the state of losses and bias rules out of Hugging Face checkpoints."""
    if adapter is None:
        return None

    def ours(name: str) -> bool:
        return ".router.aux_losses." in name or ".router.expert_bias." in name

    class Adapter(adapter):  # type: ignore[valid-type]
        def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
            return super().to_hf({k: v for k, v in state_dict.items() if not ours(k)})

    Adapter.__qualname__ = adapter.__qualname__
    return Adapter
