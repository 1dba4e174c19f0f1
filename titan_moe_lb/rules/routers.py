"""Rules of routers, for jobs and for loops of one's own. See :mod:`titan_moe_lb.rules`."""

from __future__ import annotations

from collections.abc import Mapping

from torchtitan.trainer import Trainer

from titan_moe_lb.balancing.router import SCORE_FUNCTIONS, LoadBalancedRouter
from titan_moe_lb.errors import JobError, nearest
from titan_moe_lb.rules.layer_names import layer_name


def check_routers(routers: Mapping[str, LoadBalancedRouter.Config]) -> None:
    """Run every rule of this page.

    Args:
        routers: of a model, or of a rank's part of it, by the module name of each.

    Raises:
        JobError: the first rule that does not hold.
    """
    for name, router in routers.items():
        where = layer_name(name)
        _expert_groups_fit(where, router)
        _score_function_is_known(where, router)
        _one_loss_of_each_kind(where, router)
    _losses_are_alike(routers)


def _expert_groups_fit(where: str, router: LoadBalancedRouter.Config) -> None:
    if not 1 <= router.top_k <= router.num_experts:
        raise JobError(f"top_k {router.top_k} of {where} is outside [1, {router.num_experts}]")
    groups, limited = router.num_expert_groups, router.num_limited_groups
    if groups is None:
        return
    if router.num_experts % groups or router.num_experts // groups < 2:
        raise JobError(
            f"num_expert_groups {groups} of {where} must divide the {router.num_experts} experts "
            "into groups of at least 2"
        )
    if limited is None or not 1 <= limited <= groups:
        raise JobError(f"num_limited_groups {limited} of {where} is outside [1, {groups}]")
    reachable = limited * (router.num_experts // groups)
    if router.top_k > reachable:
        raise JobError(
            f"top_k {router.top_k} of {where} exceeds the {reachable} experts of "
            f"{limited} of {groups} groups"
        )


def _score_function_is_known(where: str, router: LoadBalancedRouter.Config) -> None:
    if router.score_func not in SCORE_FUNCTIONS:
        raise JobError(
            f"score_func of {where} is {router.score_func!r}; the router knows no such function; "
            f"{nearest(router.score_func, SCORE_FUNCTIONS)}"
        )


def _one_loss_of_each_kind(where: str, router: LoadBalancedRouter.Config) -> None:
    kinds = [type(loss) for loss in router.aux_losses]
    for kind in kinds:
        if kinds.count(kind) > 1:
            raise JobError(
                f'[model] aux_losses has two of type "{kind._owner.type_name}" for '  # type: ignore[attr-defined]
                f"{where}: their weights would add up; keep one"
            )


def _losses_are_alike(routers: Mapping[str, LoadBalancedRouter.Config]) -> None:
    """The weights of the losses, and what they count, are those of the first layer."""
    losses = {
        name: [loss.describe() for loss in router.aux_losses] for name, router in routers.items()
    }
    first = next(iter(losses), "")
    for name, of_layer in losses.items():
        if of_layer != losses[first]:
            raise JobError(
                f"aux_losses of {layer_name(name)} are {', '.join(of_layer) or 'none'}, and those of "
                f"{layer_name(first)} {', '.join(losses[first]) or 'none'}: give every layer the same"
            )


def routers_are_right(config: Trainer.Config) -> None:
    check_routers({fqn: router for fqn, router, *_ in config.traverse(LoadBalancedRouter.Config)})


RULES = (routers_are_right,)
