"""Load balancing for any torchtitan MoE model: swap its routers, bind them to the job."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, field
from typing import Literal

from torchtitan.config.override import derive
from torchtitan.models.common.moe import MoE, TokenChoiceTopKRouter
from torchtitan.protocols.model import BaseModel, ModelConfigConverter
from torchtitan.trainer import Trainer

from titan_moe_lb import rules
from titan_moe_lb.errors import JobError
from titan_moe_lb.expert_bias import SignBias
from titan_moe_lb.forced_routing import ForcedRouting
from titan_moe_lb.losses.base import AuxLoss
from titan_moe_lb.parallel import batch_cut
from titan_moe_lb.parallel.layer_numbers import layer_numbers
from titan_moe_lb.router import LoadBalancedRouter
from titan_moe_lb.step_hook import register_load_balancing
from titan_moe_lb.telemetry.describe_run import describe_run
from titan_moe_lb.telemetry.metrics import LoadBalanceMetricsProcessor


class LoadBalanceConverter(ModelConfigConverter):
    """Give every MoE layer of a model config a :class:`LoadBalancedRouter`.

    :func:`titan_moe_lb.model_spec.balanced` applies it together with the step hook that
    it needs; in torchtitan's own ``converters=`` it would lack the hook and is refused.
    The converted config also checks the job and binds the losses to it in
    ``update_from_config``, which torchtitan calls before it builds the model.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ModelConfigConverter.Config):
        aux_losses: list[AuxLoss.Config] = field(default_factory=list)
        """Losses of every router, each with its own copy."""

        load_balance_coeff: float | None | Literal["keep"] = "keep"
        """Speed of the aux-loss-free expert bias (arXiv 2408.15664); None turns it off,
        "keep" leaves the model's own."""

        forced_routing: ForcedRouting.Config | None = None
        """What decides where tokens go in a benchmark; None for training."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def convert(self, model_config: BaseModel.Config) -> BaseModel.Config:
        """Convert in place where possible; returns the new root.

        Raises:
            JobError: the model has no MoE layer, or a router that is not torchtitan's.
        """
        layers = list(model_config.traverse(MoE.Config))
        if not layers:
            raise JobError(
                f"{type(model_config).__qualname__} has no MoE layer, so it can take no "
                "aux loss: leave out [model] aux_losses or choose a MoE flavor"
            )
        numbers = layer_numbers(model_config)
        for fqn, moe, _parent, _attribute in layers:
            assert isinstance(moe, MoE.Config)
            if type(moe.router) is not TokenChoiceTopKRouter.Config:
                raise JobError(
                    f"{fqn}.router is a {type(moe.router).__qualname__}; only torchtitan's "
                    "TokenChoiceTopKRouter can be replaced"
                )
            if self.config.load_balance_coeff != "keep":
                moe.load_balance_coeff = self.config.load_balance_coeff
            moe.router = derive(
                moe.router,
                LoadBalancedRouter.Config,
                aux_losses=copy.deepcopy(self.config.aux_losses),
                forced_routing=copy.deepcopy(self.config.forced_routing),
                layer=numbers[fqn],
                expert_bias=(
                    None
                    if moe.load_balance_coeff is None
                    else SignBias.Config(speed=moe.load_balance_coeff)
                ),
            )
        bound = _bound_to_job(type(model_config))  # type: ignore[arg-type]
        return derive(model_config, bound)


@functools.cache
def _bound_to_job(model_config_cls: type[BaseModel.Config]) -> type[BaseModel.Config]:
    """A subclass of a model's Config that binds its routers in ``update_from_config``."""

    @dataclass(kw_only=True, slots=True)
    class Config(model_config_cls):
        def update_from_config(self, *, config, **kwargs) -> None:
            _has_step_hook(config)
            rules.validate(config)
            model_config_cls.update_from_config(self, config=config, **kwargs)
            metrics = config.metrics
            reports = isinstance(metrics, LoadBalanceMetricsProcessor.Config)
            for _fqn, moe, _parent, _attribute in self.traverse(MoE.Config):
                if isinstance(moe.router, LoadBalancedRouter.Config):
                    moe.router.update_from_config(
                        config=config,
                        track=reports and metrics.track_moe_metrics,
                        record_tokens=reports and bool(metrics.record_routing_steps),
                    )
            if reports and any(self.traverse(LoadBalancedRouter.Config)):
                metrics.run_info = describe_run(config)
                metrics.cut = batch_cut.cut(config)

    Config.__qualname__ = f"LoadBalanced{model_config_cls.__qualname__}"
    return Config


def _has_step_hook(config: Trainer.Config) -> None:
    """Without the hook no step would be closed: no metrics, no counts for the next step."""
    spec = config.model_spec
    if spec is not None and spec.post_optimizer_build_fn is not register_load_balancing:
        raise JobError(
            f"the routers of {spec.name} were converted but its step hook was not set: use "
            "titan_moe_lb.model_spec.balanced(spec, aux_losses=[...]) in place of "
            "converters=[LoadBalanceConverter.Config(...)]"
        )
