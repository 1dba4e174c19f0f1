"""Rules of routers, for jobs and for users' own training loops."""

from __future__ import annotations

import dataclasses
from typing import Any

from titan_moe_lb.balancing.component import Component
from titan_moe_lb.balancing.expert_bias import QuantileBias
from titan_moe_lb.balancing.recording.step_record import MOST_OBSERVATIONS
from titan_moe_lb.balancing.router import LoadBalancedRouter, router_configs
from titan_moe_lb.balancing.score_functions import SCORE_FUNCTIONS
from titan_moe_lb.errors import JobError, nearest
from titan_moe_lb.parallel.layer_numbers import layer_name
from titan_moe_lb.resolved_job import Job


def check_router(where: str, router: LoadBalancedRouter.Config) -> None:
    """Check top_k, expert groups, score function and losses of one router."""
    num_experts, top_k = router.num_experts, router.top_k
    if not 1 <= top_k <= num_experts:
        raise JobError(f"top_k {top_k} of {where} is outside [1, {num_experts}]")
    groups, limited = router.num_expert_groups, router.num_limited_groups
    if groups is not None:
        if num_experts % groups or num_experts // groups < 2:
            raise JobError(
                f"num_expert_groups {groups} of {where} must divide the {num_experts} experts into "
                "groups of at least 2"
            )
        if limited is None or not 1 <= limited <= groups:
            raise JobError(f"num_limited_groups {limited} of {where} is outside [1, {groups}]")
        reachable = limited * (num_experts // groups)
        if top_k > reachable:
            raise JobError(
                f"top_k {top_k} of {where} exceeds the {reachable} experts of {limited} of {groups} "
                "groups"
            )
    if router.score_func not in SCORE_FUNCTIONS:
        raise JobError(
            f"score_func of {where} is {router.score_func!r}; the router knows no such function; "
            f"{nearest(router.score_func, SCORE_FUNCTIONS)}"
        )
    names = [loss._owner.type_name for loss in router.aux_losses]
    for name in names:
        if names.count(name) > 1:
            raise JobError(
                f'[model] aux_losses has two of type "{name}" for {where}: their weights would add '
                "up; keep one"
            )


def check_alike(routers: list[tuple[str, LoadBalancedRouter.Config]]) -> None:
    """Check that all layers have the same losses and the same forced routing.

    A step has one weight per loss and one column per metric, for all layers. Only the rule of the
    expert bias may differ by layer.
    """
    if not routers:
        return
    (first, reference), *others = routers
    for where, router in others:
        if list(map(_given, router.aux_losses)) != list(map(_given, reference.aux_losses)):
            raise JobError(
                f"{where} has aux_losses {_described(router.aux_losses)} and {first} has "
                f"{_described(reference.aux_losses)}: give all layers the same, in the same order"
            )
        if _given(router.forced_routing) != _given(reference.forced_routing):
            raise JobError(
                f"{where} has forced_routing {_described([router.forced_routing])} and {first} has "
                f"{_described([reference.forced_routing])}: give all layers the same"
            )


def _given(component: Component.Config | None) -> tuple[type, dict[str, Any]] | None:
    """Return the user's choice, without the values that a job fills in for each layer."""
    if component is None:
        return None
    own = {field.name for field in dataclasses.fields(component)} - component._owner.filled_by_job
    return type(component), {name: getattr(component, name) for name in own}


def _described(components: list[Any]) -> str:
    return ", ".join(one.describe() for one in components if one is not None) or "none"


def routers_are_right(job: Job) -> None:
    """Check all routers of a job with :func:`check_router` and :func:`check_alike`."""
    routers = [(layer_name(fqn), router) for fqn, router in router_configs(job.config).items()]
    for where, router in routers:
        check_router(where, router)
    check_alike(routers)


def histograms_hold_a_step(job: Job) -> None:
    """Refuse a global batch with more tokens than a bias rule with a histogram can count."""
    tokens = job.cut.global_batch_size * job.cut.seq_len
    for router in router_configs(job.config).values():
        if isinstance(router.expert_bias, QuantileBias.Config) and tokens > MOST_OBSERVATIONS:
            raise JobError(
                f"training.global_batch_size {job.cut.global_batch_size} has {tokens:,} tokens a "
                f"step, and the histogram of [model] expert_bias counts at most "
                f'{MOST_OBSERVATIONS:,}: lower it, or choose another rule, such as "sign"'
            )


RULES = (
    routers_are_right,
    histograms_hold_a_step,
)
