"""Rules of forced routing and of routing recorded for replay."""

from __future__ import annotations

import copy
from typing import Any

import torch

from titan_moe_lb.balancing.forced_routing import (
    ForcedRouting,
    HotRank,
    HotShare,
    Replay,
    TokenIndexRouting,
    ZeroLoad,
)
from titan_moe_lb.balancing.router import LoadBalancedRouter, router_configs
from titan_moe_lb.errors import JobError
from titan_moe_lb.parallel.layer_numbers import layer_name
from titan_moe_lb.resolved_job import Job
from titan_moe_lb.telemetry.describe_run import describe_run
from titan_moe_lb.traces.routing_trace import open_routing_trace


def one_way_to_force_routing(job: Job) -> None:
    """Refuse ``debug.moe_force_load_balance`` together with ``forced_routing``."""
    if job.config.debug.moe_force_load_balance and _forced(job):
        raise JobError(
            "debug.moe_force_load_balance and [model] forced_routing are both on: keep one "
            '(the former is forced_routing type = "round_robin")'
        )


def hot_ranks_exist(job: Job) -> None:
    """Check that an EP group has the ranks of ``hot_rank``."""
    degree = job.config.parallelism.expert_parallel_degree
    for _fqn, _router, forced in _forced(job, HotRank):
        if degree == 1:
            raise JobError(
                "forced_routing hot_rank overloads an expert-parallel rank, and "
                "parallelism.expert_parallel_degree is 1: set it to at least 2"
            )
        for rank in forced.hot_ranks:
            if not 0 <= rank < degree:
                raise JobError(
                    f"forced_routing hot_rank has rank {rank}; the ranks of an EP group of "
                    f"{degree} are 0 to {degree - 1}"
                )


def hot_share_finds_experts(job: Job) -> None:
    """Check that ``hot_share`` leaves a cold expert, and that top_k permits its fraction."""
    for fqn, router, forced in _forced(job, HotShare):
        what = f"forced_routing {forced.describe()}"
        total, top_k = router.num_experts, router.top_k
        hot = len(_bound(forced, router, job).hot_experts())
        if hot >= total:
            raise JobError(
                f"{what} makes {hot} experts hot and {layer_name(fqn)} has {total}: leave at least one cold, "
                'or take type = "round_robin"'
            )
        low = max(0, top_k - (total - hot)) / top_k
        high = min(hot, top_k) / top_k
        if not low <= forced.fraction <= high:
            raise JobError(
                f"{what}: {hot} of the {total} experts of {layer_name(fqn)} are hot and a token takes {top_k} "
                f"different ones, so the fraction must be in [{low:g}, {high:g}]"
            )


def zero_load_leaves_experts(job: Job) -> None:
    """Check that ``zero_load`` leaves at least top_k experts with load."""
    for fqn, router, forced in _forced(job, ZeroLoad):
        most = router.num_experts - router.top_k
        if forced.num_zero > most:
            raise JobError(
                f"forced_routing zero_load has num_zero {forced.num_zero}, and a token takes "
                f"{router.top_k} different ones of the {router.num_experts} experts of {layer_name(fqn)}: "
                f"num_zero must be at most {most}"
            )


TRIED_TOKENS = 2**18


def forced_routing_keeps_group_limit(job: Job) -> None:
    """Check that token-index strategies keep the limit of expert groups per token.

    Random strategies apply the limit themselves. This check routes at most ``TRIED_TOKENS``
    tokens, from the start of the global batch, because most strategies repeat much sooner.
    """
    tried = []
    for fqn, router, forced in _forced(job, TokenIndexRouting):
        kind = (
            router.num_experts,
            router.top_k,
            router.num_expert_groups,
            router.num_limited_groups,
        )
        if kind in tried or router.num_expert_groups is None:
            continue
        tried.append(kind)
        forced = _bound(forced, router, job)
        total_tokens = job.cut.global_batch_size * job.cut.seq_len
        steps = forced.different_steps()
        tokens_T = torch.arange(min(total_tokens, TRIED_TOKENS // len(steps)))
        deal = forced.build().deal
        most = max(
            _most_groups(deal(tokens_T, total_tokens, torch.tensor(step)), router) for step in steps
        )
        if most > router.num_limited_groups:
            raise JobError(
                f"forced_routing {forced.describe()} sends a token to {most} expert groups and "
                f"{layer_name(fqn)} allows {router.num_limited_groups}: take another fraction or "
                'placement, or type = "random_balanced" or "biased_normal", which keep the limit'
            )


def _most_groups(ids_TK: torch.Tensor, router: LoadBalancedRouter.Config) -> int:
    """Return the largest number of expert groups that a token reaches."""
    groups_TK = ids_TK // (router.num_experts // router.num_expert_groups)
    reached_TG = torch.nn.functional.one_hot(groups_TK, router.num_expert_groups).amax(dim=1)
    return int(reached_TG.sum(dim=1).max())


def replayed_trace_fits(job: Job) -> None:
    """Check that a replayed trace has this job's model, global batch and steps."""
    for _fqn, _router, forced in _forced(job, Replay)[:1]:
        trace = open_routing_trace(forced.trace)
        here, there = describe_run(job), trace.info
        here.require_same_model(there, "this job", str(trace.folder))
        for name in ("global_batch_size", "seq_len"):
            ours, theirs = getattr(here, name), getattr(there, name)
            if ours != theirs:
                raise JobError(
                    f"{trace.folder} was recorded with {name} {theirs} and this job has {ours}: "
                    f"only the same global batch can be replayed; set training.{name} = {theirs}"
                )
        missing = sorted(set(forced.steps or ()) - set(trace.steps))
        if missing:
            raise JobError(
                f"forced_routing replay needs step {missing[0]}; {trace.folder} contains "
                f"steps {', '.join(map(str, trace.steps)) or 'none'}"
            )
        _whole_sequence_order_is_known(job, "replay")


def recorded_routing_can_be_replayed(job: Job) -> None:
    """Check ``metrics.record_routing_steps``, and that the tokens of each rank are known."""
    steps = getattr(job.config.metrics, "record_routing_steps", None)
    if steps:
        for step in steps:
            if not 1 <= step <= job.config.training.steps:
                raise JobError(
                    f"metrics.record_routing_steps has step {step}; the steps of this job are 1 "
                    f"to {job.config.training.steps} (training.steps)"
                )
        _whole_sequence_order_is_known(job, "metrics.record_routing_steps")


def _whole_sequence_order_is_known(job: Job, what: str) -> None:
    balancer = job.config.parallelism.context_parallel_load_balancer
    if job.config.parallelism.context_parallel_degree > 1 and balancer not in ("headtail", None):
        raise JobError(
            f"{what} needs to know which tokens a rank has, and the {balancer!r} balancer of "
            "context parallelism decides that by the data: set "
            'parallelism.context_parallel_load_balancer = "headtail"'
        )


def _forced(
    job: Job, kind: type[ForcedRouting] = ForcedRouting
) -> list[tuple[str, LoadBalancedRouter.Config, Any]]:
    """Find name, router and forced strategy of every layer that has one of a kind."""
    return [
        (fqn, router, router.forced_routing)
        for fqn, router in router_configs(job.config).items()
        if isinstance(router.forced_routing, kind.Config)
    ]


def _bound(forced: Any, router: LoadBalancedRouter.Config, job: Job) -> Any:
    """Return a copy of a strategy's Config, bound to its router and the job."""
    router = copy.copy(router)
    router.forced_routing = copy.deepcopy(forced)
    router.bind(job)
    return router.forced_routing


RULES = (
    one_way_to_force_routing,
    hot_ranks_exist,
    hot_share_finds_experts,
    zero_load_leaves_experts,
    forced_routing_keeps_group_limit,
    replayed_trace_fits,
    recorded_routing_can_be_replayed,
)
