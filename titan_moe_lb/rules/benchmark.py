"""Forced routing, and the recording that it replays. See :mod:`titan_moe_lb.rules`."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch._dynamo
from torchtitan.trainer import Trainer

from titan_moe_lb.errors import JobError
from titan_moe_lb.forced_routing import DealtRouting, HotRank, Replay
from titan_moe_lb.parallel import batch_cut
from titan_moe_lb.router import LoadBalancedRouter
from titan_moe_lb.telemetry.describe_run import describe_run
from titan_moe_lb.traces.routing_trace import open_routing_trace


def one_way_to_force_routing(config: Trainer.Config) -> None:
    if config.debug.moe_force_load_balance and _forced(config):
        raise JobError(
            "debug.moe_force_load_balance and [model] forced_routing are both on: keep one "
            '(the former is forced_routing type = "round_robin")'
        )


def hot_ranks_exist(config: Trainer.Config) -> None:
    degree = config.parallelism.expert_parallel_degree
    for fqn, router, forced in _forced(config):
        if not isinstance(forced, HotRank.Config):
            continue
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
        hot = len(forced.hot_ranks) * (router.num_experts // degree)
        low = max(0, router.top_k - (router.num_experts - hot)) / router.top_k
        high = min(hot, router.top_k) / router.top_k
        if not low <= forced.fraction <= high:
            raise JobError(
                f"forced_routing hot_rank has fraction {forced.fraction:g}, but the hot ranks "
                f"hold {hot} of the {router.num_experts} experts of {fqn} and a token takes "
                f"{router.top_k} different ones: the fraction must be in [{low:g}, {high:g}]"
            )


def forced_routing_keeps_group_limit(config: Trainer.Config) -> None:
    """The random strategies apply the limit themselves; the dealt ones are tried out."""
    for fqn, router, forced in _forced(config)[:1]:
        if router.num_expert_groups is None or not issubclass(forced._owner, DealtRouting):
            continue
        forced = copy.deepcopy(forced)
        forced.update_from_config(config=config, num_experts=router.num_experts, top_k=router.top_k)
        cut = batch_cut.cut(config)
        tokens = cut.micro_batch_size * cut.local_sequence_length
        tokens *= config.parallelism.expert_parallel_degree
        ids_TK = forced.build().deal(torch.arange(tokens), tokens)
        groups_TK = ids_TK // (router.num_experts // router.num_expert_groups)
        reached_TG = torch.nn.functional.one_hot(groups_TK, router.num_expert_groups).amax(dim=1)
        most = int(reached_TG.sum(dim=1).max())
        if most > router.num_limited_groups:
            raise JobError(
                f"forced_routing {forced.describe()} sends a token to {most} expert groups and "
                f"{fqn} allows {router.num_limited_groups}: take another fraction, or type = "
                '"random_balanced" or "biased_normal", which keep the limit'
            )


def replayed_trace_fits(config: Trainer.Config) -> None:
    for _fqn, _router, forced in _forced(config)[:1]:
        if not isinstance(forced, Replay.Config):
            continue
        trace = open_routing_trace(forced.trace)
        here, there = describe_run(config), trace.info
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
                f"forced_routing replay asks for step {missing[0]}, and {trace.folder} holds "
                f"steps {', '.join(map(str, trace.steps)) or 'none'}"
            )
        _whole_sequence_order_is_known(config, "replay")


def recorded_routing_can_be_replayed(config: Trainer.Config) -> None:
    steps = getattr(config.metrics, "record_routing_steps", None)
    if steps:
        for step in steps:
            if not 1 <= step <= config.training.steps:
                raise JobError(
                    f"metrics.record_routing_steps has step {step}; the steps of this job are 1 "
                    f"to {config.training.steps} (training.steps)"
                )
        _whole_sequence_order_is_known(config, "metrics.record_routing_steps")


def _whole_sequence_order_is_known(config: Trainer.Config, what: str) -> None:
    balancer = config.parallelism.context_parallel_load_balancer
    if config.parallelism.context_parallel_degree > 1 and balancer not in ("headtail", None):
        raise JobError(
            f"{what} needs to know which tokens a rank has, and the {balancer!r} balancer of "
            "context parallelism decides that by the data: set "
            'parallelism.context_parallel_load_balancer = "headtail"'
        )


def _forced(config: Trainer.Config) -> list[tuple[str, Any, Any]]:
    """Name, router and forced strategy of every layer that has one."""
    return [
        (fqn, router, router.forced_routing)
        for fqn, router, _parent, _attribute in config.traverse(LoadBalancedRouter.Config)
        if router.forced_routing is not None
    ]


RULES = (
    one_way_to_force_routing,
    hot_ranks_exist,
    forced_routing_keeps_group_limit,
    replayed_trace_fits,
    recorded_routing_can_be_replayed,
)
