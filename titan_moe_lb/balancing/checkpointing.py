"""Extensions of torchtitan's parallelization for balanced models.

Activation checkpointing saves the routing decisions, routers read their pipeline schedule, and
frozen weights stay frozen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torchtitan.config.override import derive
from torchtitan.distributed.activation_checkpoint import (
    ActivationCheckpointing,
    FullAC,
    SelectiveAC,
)

from titan_moe_lb.balancing.recording.recomputation import Decisions, save_decision
from titan_moe_lb.balancing.router import routers_of
from titan_moe_lb.parallel.schedules import actions_of, stages_of
from titan_moe_lb.upstream.stage_ends import make_contiguous
from titan_moe_lb.upstream.torch_internals import CHECKPOINT_PREFIX, checkpoint_wrapper

SAVE = torch.ops.titan_moe_lb.save_decision.default


class FullACSavingDecisions(FullAC):
    """``FullAC`` that recomputes a block except for the routing decisions.

    Besides its input, a block saves the expert ids, 8 K bytes a token, and a table of losses, 4 E
    bytes a sequence. An eager forward runs no additional operator. A recomputed forward skips the
    choice.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(FullAC.Config):
        compiled: bool = False
        """True if the block is compiled; the policy then selects operators."""

    def _wrap_block(self, module: nn.Module, *, base_fqn: str | None = None) -> nn.Module:
        if self.config.compiled:
            _save_by_operator(module)
        return checkpoint_wrapper(
            module,
            context_fn=_contexts_of_operators if self.config.compiled else Decisions.contexts,
            preserve_rng_state=self.config.preserve_rng_state,
            determinism_check=self.config.determinism_check,
            early_stop=False,
            debug=self.config.debug,
        )


class SelectiveACSavingDecisions(SelectiveAC):
    """``SelectiveAC`` that saves the routing decisions instead of every top-k."""

    @dataclass(kw_only=True, slots=True)
    class Config(SelectiveAC.Config):
        """Settings of selective checkpointing."""

    def get_save_ops(self) -> set:
        """Replace the top-k by the operator that saves a decision."""
        return super().get_save_ops() - {torch.ops.aten.topk.default} | {SAVE}

    def _wrap_block(self, module: nn.Module, *, base_fqn: str | None = None) -> nn.Module:
        _save_by_operator(module)
        return super()._wrap_block(module, base_fqn=base_fqn)


def _save_by_operator(block: nn.Module) -> None:
    for router in routers_of([block]):
        router.save = save_decision


def _contexts_of_operators() -> tuple:
    def policy(context, operator, *args, **kwargs) -> CheckpointPolicy:
        saved = operator is SAVE
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def saving_decisions(parallelize: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Wrap a ``ModelSpec.parallelize_fn`` so that checkpointing saves the routing decisions.

    Parameters that are frozen before it runs stay frozen.
    """

    @functools.wraps(parallelize)
    def parallelize_saving_decisions(
        model: nn.Module,
        *,
        compile_config: Any,
        ac_config: ActivationCheckpointing.Config | None,
        **others: Any,
    ) -> nn.Module:
        compiled = compile_config.enable and "model" in compile_config.components
        if type(ac_config) is FullAC.Config:
            ac_config = derive(ac_config, FullACSavingDecisions.Config, compiled=compiled)
        elif type(ac_config) is SelectiveAC.Config:
            ac_config = derive(ac_config, SelectiveACSavingDecisions.Config)
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        model = parallelize(model, compile_config=compile_config, ac_config=ac_config, **others)
        # torchtitan 0.3.0 makes new parameters under spmd_types, and all of them learn.
        for name, parameter in model.named_parameters():
            if name.replace(CHECKPOINT_PREFIX, "") in frozen:
                parameter.requires_grad_(False)
        return model

    return parallelize_saving_decisions


def announcing_schedule(pipeline: Callable[..., tuple]) -> Callable[..., tuple]:
    """Wrap a ``ModelSpec.pipelining_fn`` so that routers know their stage and schedule."""

    @functools.wraps(pipeline)
    def pipeline_announcing_schedule(model: nn.Module, **arguments: Any) -> tuple:
        schedule, parts, has_first, has_last = pipeline(model, **arguments)
        rank = arguments["parallel_dims"].get_mesh("pp").get_local_rank()
        actions = actions_of(schedule)[rank]
        for stage, part in zip(stages_of(actions), parts, strict=True):
            for router in routers_of([part]):
                router.stage, router.actions = stage, actions
            make_contiguous(part)
        return schedule, parts, has_first, has_last

    return pipeline_announcing_schedule
