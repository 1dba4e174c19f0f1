"""Load balancing for any torchtitan MoE model: replace its routers and bind them to the job."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn
from torchtitan.components.checkpointer import TRAIN_STATE
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.config.override import derive
from torchtitan.distributed import ParallelDims
from torchtitan.models.common.moe import MoE, TokenChoiceTopKRouter
from torchtitan.protocols.model import BaseModel, ModelConfigConverter
from torchtitan.tools.logging import logger
from torchtitan.trainer import Trainer

from titan_moe_lb import rules
from titan_moe_lb.balancing.expert_bias import ExpertBias, FrozenBias, SignBias
from titan_moe_lb.balancing.forced_routing import ForcedRouting
from titan_moe_lb.balancing.forced_routing.base import announce
from titan_moe_lb.balancing.freezing import Freeze, freeze_gates
from titan_moe_lb.balancing.hash_router import counted, is_hash_router
from titan_moe_lb.balancing.losses.base import AuxLoss
from titan_moe_lb.balancing.own_dtypes import keep_dtypes
from titan_moe_lb.balancing.recording.training_loop import TrainingLoop
from titan_moe_lb.balancing.router import (
    LoadBalancedRouter,
    moe_layers_of,
    router_configs,
    routers_of,
)
from titan_moe_lb.balancing.score_functions import ScoreFunction
from titan_moe_lb.balancing.step_hook import StepHook, wire_parts
from titan_moe_lb.balancing.valid_tokens.loader import with_token_mask
from titan_moe_lb.checkpoints import loading
from titan_moe_lb.errors import JobError
from titan_moe_lb.parallel import single_process
from titan_moe_lb.parallel.layer_numbers import layer_numbers
from titan_moe_lb.parallel.rank_groups import RankGroups
from titan_moe_lb.resolved_job import Job
from titan_moe_lb.rules.model import layers_count_their_experts_alike
from titan_moe_lb.telemetry import metrics_processor
from titan_moe_lb.telemetry.describe_run import describe_run
from titan_moe_lb.telemetry.metrics_processor import LoadBalanceMetricsProcessor
from titan_moe_lb.upstream import cpu
from titan_moe_lb.wiring.bias_on_resume import BiasReset, remember_once_loaded, start_anew


class LoadBalanceConverter(ModelConfigConverter):
    """Converter that replaces every router of a model config by a :class:`LoadBalancedRouter`.

    :func:`titan_moe_lb.wiring.model_spec.balanced` applies it together with the step hook that it
    needs. In torchtitan's own ``converters=`` the hook is missing, and the job is refused. The
    converted config checks the job and binds the losses to it in ``update_from_config``, which
    torchtitan calls before it builds the model.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ModelConfigConverter.Config):
        aux_losses: list[AuxLoss.Config] = field(default_factory=list)
        """Losses of every router; each router has its own copy."""

        expert_bias: ExpertBias.Config | None | Literal["keep"] = "keep"
        """Rule that moves the bias of every layer; None for no bias, "keep" for torchtitan's sign
        rule at the model's own ``load_balance_coeff``."""

        forced_routing: ForcedRouting.Config | None = None
        """Strategy that chooses the experts in a benchmark; None for training."""

        score_func: ScoreFunction | Literal["keep"] = "keep"
        """Score function of every router; "keep" for the model's own."""

        freeze: Freeze | None = None
        """Parts that do not learn, by layer; None for none."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def convert(self, model_config: BaseModel.Config) -> BaseModel.Config:
        """Convert in place if possible, and return the new root."""
        layers = list(model_config.traverse(MoE.Config))
        if not layers:
            raise JobError(
                f"{type(model_config).__qualname__} has no MoE layer to balance: "
                "leave out [model] aux_losses or choose a MoE flavor "
                "(a Hugging Face model: titan_moe_lb.balanced_transformers)"
            )
        rule = self.config.expert_bias
        if rule not in (None, "keep") and not isinstance(rule, ExpertBias.Config):
            raise JobError(f"expert_bias is {rule!r}; a model has one rule, None or 'keep'")
        configs = {fqn: moe for fqn, moe, _parent, _attribute in layers}
        self.convert_layers(configs, layer_numbers(model_config))
        layers_count_their_experts_alike(model_config)
        bound = _bound_to_job(type(model_config))  # type: ignore[arg-type]
        return derive(model_config, bound)

    def convert_layers(self, layers: dict[str, Any], numbers: dict[str, int]) -> None:
        """Convert layers in place, and freeze their parts.

        Both arguments are by the names of the layers in the model.
        """
        freeze = self.config.freeze or Freeze()
        frozen = freeze.resolve(numbers)
        if freeze.losses != [] and not self.config.aux_losses:
            raise JobError("freeze.losses names layers of a model without aux_losses: leave it out")
        for fqn, moe in layers.items():
            self._convert_layer(fqn, moe, numbers[fqn])
            self._freeze(moe.router, frozen)

    def _convert_layer(self, fqn: str, moe: MoE.Config, number: int) -> None:
        """Convert one layer in place."""
        # A converter such as LoRA's makes subclasses of configs that build the same classes.
        by_token_id = is_hash_router(moe.router)
        known = (TokenChoiceTopKRouter, LoadBalancedRouter)
        if moe.router._owner not in known and not hasattr(moe.router, "n_hash_layers"):
            raise JobError(
                f"{fqn}.router is a {type(moe.router).__qualname__}; only torchtitan's "
                "TokenChoiceTopKRouter can be replaced"
            )
        if by_token_id and self.config.forced_routing is not None:
            raise JobError(f"{fqn} routes by token id: leave forced_routing out")
        target = LoadBalancedRouter.Config
        if by_token_id and isinstance(moe.router, LoadBalancedRouter.Config):
            target = type(moe.router)
        elif by_token_id:
            target = counted(moe.router._owner).Config
        bias = None if by_token_id else self._expert_bias(moe)
        # torchtitan's layer has the buffer of the bias if this is a number. The number is the
        # speed of torchtitan's own update, which does not run.
        moe.load_balance_coeff = None if bias is None else (moe.load_balance_coeff or 1.0)
        moe.router = derive(
            moe.router,
            target,
            aux_losses=copy.deepcopy(self.config.aux_losses),
            expert_bias=bias,
            forced_routing=copy.deepcopy(self.config.forced_routing),
            layer=number,
            frozen=frozenset({"losses"} if by_token_id else ()),
        )
        if self.config.score_func != "keep" and not by_token_id:
            moe.router.score_func = self.config.score_func  # type: ignore[assignment]
        # The dispatcher has its own copy of top_k.
        moe.routed_experts.token_dispatcher.top_k = moe.router.top_k
        moe.router.bind()

    def _freeze(self, router: LoadBalancedRouter.Config, frozen: dict[str, set[int]]) -> None:
        """Freeze the parts of a converted layer."""
        router.frozen |= {part for part in frozen if router.layer in frozen[part]}
        if "bias" not in router.frozen or is_hash_router(router):
            return
        if router.expert_bias is None:
            raise JobError(
                f"freeze.bias names layer {router.layer}, which has no expert bias: leave it out"
            )
        router.expert_bias = FrozenBias.Config(reset=router.expert_bias.reset)
        router.bind()

    def _expert_bias(self, moe: MoE.Config) -> ExpertBias.Config | None:
        if self.config.expert_bias == "keep":
            if isinstance(moe.router, LoadBalancedRouter.Config):
                return moe.router.expert_bias
            speed = moe.load_balance_coeff
            return None if speed is None else SignBias.Config(speed=speed)
        return copy.deepcopy(self.config.expert_bias)  # type: ignore[return-value]


@dataclass
class BuildHooks:
    """``post_optimizer_build_fn`` of a balanced ``ModelSpec``: the spec's own, then ours."""

    own: Callable | None = None
    """The spec's own function."""
    reset: BiasReset | None = None
    """Reset of the expert biases. Filled by ``update_from_config`` of the model."""

    of_trainer: bool = False
    """True if torchtitan's trainer builds the model. Filled likewise. Another loop calls
    ``attach()``."""

    job: Job | None = None
    """Job that was resolved and checked before; None: ``update_from_config`` does both."""

    step_hook: StepHook | None = None
    """Step hook of the rank, once the model is built; None if no router needs one."""

    other_metrics: str = ""
    """Class of metrics that do not log the load of the experts; empty for none. Filled likewise."""

    def __call__(
        self,
        optimizers: OptimizersContainer,
        model_parts: list[nn.Module],
        parallel_dims: ParallelDims,
    ) -> None:
        """Run the spec's own function, and connect the routers to torchtitan's trainer."""
        if self.own is not None:
            self.own(optimizers, model_parts, parallel_dims)
        if not self.of_trainer:
            return
        if self.other_metrics:
            logger.warning(
                f"metrics is a {self.other_metrics}, which logs no load of the experts and writes "
                "no trace: derive it from titan_moe_lb.LoadBalanceMetricsProcessor"
            )
        groups = RankGroups.of(parallel_dims)
        hook = self.step_hook = wire_parts(model_parts, groups)
        announce([router.forced_routing for router in routers_of(model_parts)])
        if hook is not None:
            optimizers.register_step_pre_hook(lambda *args, **kwargs: hook.close_step())
            _resume_when_loaded(model_parts[0], hook, groups)
        remember_once_loaded(model_parts)
        if self.reset is not None:
            self.reset.register(model_parts)


def _resume_when_loaded(part: nn.Module, hook: StepHook, groups: RankGroups) -> None:
    """Pass the progress of the checkpoint that torchtitan loads to a step hook."""

    def resume(_part: nn.Module, state_dict: dict[str, Any], *_: Any) -> None:
        # torchtitan's CheckpointManager passes everything that it has loaded.
        if TRAIN_STATE in state_dict:
            trained = state_dict[TRAIN_STATE].state_dict()
            hook.resume(trained["step"], trained["ntokens_seen"] * groups.loss.size)

    part.register_load_state_dict_pre_hook(resume)


class _BoundToJob:
    """Marker of the classes that :func:`_bound_to_job` creates."""

    __slots__ = ()


@functools.cache
def _bound_to_job(model_config_cls: type[BaseModel.Config]) -> type[BaseModel.Config]:
    """Derive a model's Config that binds its routers in ``update_from_config``."""
    if issubclass(model_config_cls, _BoundToJob):
        return model_config_cls

    @dataclass(kw_only=True, slots=True)
    class Config(_BoundToJob, model_config_cls):
        def build(self, **kwargs):
            model = model_config_cls.build(self, **kwargs)
            for layer in moe_layers_of([model]):
                keep_dtypes(layer)
            freeze_gates(model)
            return model

        def update_from_config(self, *, config, **kwargs) -> None:
            named = router_configs(self)
            routers = list(named.values())
            for router in routers:  # a converted layer may have been changed since
                router.bind()
            if not isinstance(config, Trainer.Config):  # a loop that calls attach()
                layers_count_their_experts_alike(self)
                model_config_cls.update_from_config(self, config=config, **kwargs)
                return
            hooks = _step_hooks(config)
            hooks.of_trainer = True
            metrics_processor.adapt(config)
            loading.adapt(config)
            if hooks.job is None:
                job = Job.of(config, single_process.world_size())
                rules.validate(job)
            else:  # A trainer has a copy of the resolved config. It gets the token mask below.
                job = replace(hooks.job, config=config)
            config.dataloader = with_token_mask(
                config.dataloader,
                documents=any(
                    loss.documents is not None for router in routers for loss in router.aux_losses
                ),
            )
            model_config_cls.update_from_config(self, config=config, **kwargs)
            metrics = config.metrics
            reports = isinstance(metrics, LoadBalanceMetricsProcessor.Config)
            hooks.other_metrics = "" if reports else type(metrics).__qualname__
            loop = _loop(job)
            for router in routers:
                router.loop = loop
                router.bind(job)
            rules_of_bias = {fqn: r.expert_bias for fqn, r in named.items() if r.expert_bias}
            start_anew(job, rules_of_bias)
            hooks.reset = BiasReset.of(job, list(rules_of_bias.values()))
            if routers and reports:
                metrics.run_info = describe_run(job)
                metrics.cut = job.cut

    Config.__qualname__ = f"LoadBalanced{model_config_cls.__qualname__}"
    return Config


def _loop(job: Job) -> TrainingLoop:
    """Read the properties of the trainer's steps from a job."""
    cut, metrics = job.cut, job.config.metrics
    reports = isinstance(metrics, LoadBalanceMetricsProcessor.Config)
    recorded_tokens, gradients_every, scores_every = None, 0, 0
    # A graph repeats what its second step did.
    replayed = not (job.config.training.disable_cuda_graphs or cpu.needed())
    if reports and metrics.track_moe_metrics and metrics.router_gradients:
        gradients_every = 1 if replayed else metrics.log_freq * metrics.router_gradients_every
    if reports and metrics.track_moe_metrics and metrics.router_scores:
        # Steps whose routing is recorded are logged too.
        every_step = replayed or metrics.record_routing_steps
        scores_every = 1 if every_step else metrics.log_freq
    if reports and metrics.record_routing_steps:
        recorded_tokens = (cut.micro_batch_size, cut.local_sequence_length)
    loader = getattr(job.config.dataloader, "_owner", None)
    return TrainingLoop(
        track=reports and metrics.track_moe_metrics,
        gradients_every=gradients_every,
        scores_every=scores_every,
        num_micro_batches=cut.num_micro_batches,
        accumulation_steps=cut.accumulation_steps,
        tokens_per_step=cut.global_batch_size * cut.seq_len,
        padded=getattr(loader, "gives_valid_tokens", False),
        recorded_tokens=recorded_tokens,
        context_parallel_load_balancer=cut.context_parallel_load_balancer,
    )


def _step_hooks(config: Trainer.Config) -> BuildHooks:
    """Return the hooks of the job's model spec, without which no step would be closed."""
    spec = config.model_spec
    hooks = BuildHooks() if spec is None else spec.post_optimizer_build_fn
    if not isinstance(hooks, BuildHooks):
        raise JobError(
            f"the routers of {spec.name} were converted but its step hook was not set: use "
            "titan_moe_lb.balanced(spec, aux_losses=[...]) in place of "
            "converters=[LoadBalanceConverter.Config(...)]"
        )
    return hooks
