"""What the flags of ``titan-moe-lb plan`` say, read and checked."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from titan_moe_lb.commands.plan.plan_arguments import PlanArguments
from titan_moe_lb.costmodel.loads.expert_load import TOLERANCE, WORST
from titan_moe_lb.costmodel.loads.lognormal import MOST_SIGMA, Overload, Spread
from titan_moe_lb.costmodel.times.layer import MoELayer
from titan_moe_lb.errors import JobError


def check(flags: PlanArguments) -> None:
    """What can be said before the job is read."""
    if flags.hot_experts < 1:
        raise JobError(f"--hot-experts {flags.hot_experts} must be at least 1")
    for name in ("compute_efficiency", "network_efficiency"):
        share = getattr(flags, name)
        if not 0 < share <= 1:
            raise JobError(
                f"--{name.replace('_', '-')} {share} must be above 0 and at most 1: it is a share"
            )
    if flags.drop_share is not None and not 0 < flags.drop_share < 1:
        raise JobError(f"--drop-share {flags.drop_share} must be above 0 and below 1")
    for name, given in (
        ("redundant-experts", flags.redundant_experts),
        ("drop-share", flags.drop_share),
    ):
        if given is not None and flags.from_run is None:
            raise JobError(f"--{name} is answered from the load of a run: give --from-run as well")
    if flags.serve:
        if flags.drop_share is not None:
            raise JobError("--drop-share is about the buffers of a training: leave out --serve")
        if flags.ranks is not None:
            raise JobError("--ranks is of a training; a deployment has the devices of --ep")
        return
    for name, given in (("tokens", flags.tokens), ("context", flags.context)):
        if given is not None:
            raise JobError(f"--{name} is of a deployment: give --serve as well")
    if flags.dispatcher == "low_latency":
        raise JobError(
            "--dispatcher low_latency is of kernels without a backward: give --serve as well, or "
            "take deepep"
        )


def imbalances(text: str) -> tuple[list[float], list[Spread | Overload]]:
    """Imbalances of the two-level load, and log-normal ones."""
    factors: list[float] = []
    drawn: list[Spread | Overload] = []
    for word in (word.strip() for word in text.split(",")):
        kind, colon, number = word.partition(":")
        try:
            if word == "worst":
                factors.append(WORST)
            elif colon and kind == "lognormal":
                drawn.append(Spread(sigma=float(number), name=f"σ {float(number):.2f}"))
            elif colon and kind == "overload":
                overload, _at, degree = number.partition("@")
                drawn.append(Overload(factor=float(overload), ep_degree=int(degree)))
            else:
                factors.append(float(word))
        except ValueError:
            raise JobError(
                f"--imbalance {text}: {word!r} is neither a number nor 'worst' nor lognormal:SIGMA "
                "nor overload:FACTOR@EP"
            ) from None
    for factor in factors:
        if not (factor == WORST or factor >= 1):
            raise JobError(f"--imbalance {factor:g} is below 1, which is balance")
    for given in drawn:
        if isinstance(given, Spread) and not 0 <= given.sigma <= MOST_SIGMA:
            raise JobError(
                f"--imbalance lognormal:{given.sigma:g} is outside [0, {MOST_SIGMA:g}]; recorded "
                "loads have 0.1 to 1.5"
            )
        if isinstance(given, Overload) and not (given.factor >= 1 and given.ep_degree > 1):
            raise JobError(
                f"--imbalance {given}: an overload factor is at least 1, of an EP degree above 1"
            )
    return factors or [1.0], drawn


def spreads(drawn: list[Spread | Overload], layers: Sequence[MoELayer]) -> list[Spread]:
    """An overload factor as the log-normal loads that have it in these layers."""
    return [given.spread(layers) if isinstance(given, Overload) else given for given in drawn]


def whole_numbers(flag: str, text: str, example: str = "") -> list[int]:
    """Each once, in the order given."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise JobError(f"{flag} {text} must be whole numbers of at least 1{example}")
    return list(dict.fromkeys(int(word) for word in words))


def degrees(flags: PlanArguments) -> list[int]:
    """Those asked for; none if none are."""
    return whole_numbers("--ep", flags.ep, ", as in 8,16,32") if flags.ep else []


def redundant(flags: PlanArguments, degrees: list[int]) -> list[int]:
    if flags.redundant_experts is None:
        return []
    numbers = whole_numbers("--redundant-experts", flags.redundant_experts)
    for number in numbers:
        for degree in degrees:
            if number % degree:
                raise JobError(
                    f"--redundant-experts {number} is no multiple of EP {degree}: every rank "
                    "holds as many copies as the others"
                )
    return numbers


def fit_model(
    flags: PlanArguments, factors: list[float], moe_layers: Mapping[int, MoELayer]
) -> None:
    """Whether the model's layers can be as unbalanced as is asked."""
    for number, layer in moe_layers.items():
        if flags.hot_experts > layer.top_k:
            raise JobError(
                f"--hot-experts {flags.hot_experts} is above the {layer.top_k} experts that a "
                f"token takes in layer {number}: no more can be the most loaded at once"
            )
        worst = layer.num_experts / layer.top_k
        if max(factors) > worst * (1 + TOLERANCE):
            raise JobError(
                f"--imbalance {max(factors):g} is above {worst:g}, the worst of layer {number}, "
                f"where every token takes the same {layer.top_k} of {layer.num_experts} experts"
            )


def ranks(flags: PlanArguments, of_job: int | None) -> int:
    """The flag; else NGPU, as when the job is started; else what the job wants; else 1."""
    announced = os.environ.get("NGPU")
    if flags.ranks is None and announced and not announced.isdecimal():
        raise JobError(f"NGPU={announced} must be a whole number of at least 1")
    number = int(announced or of_job or 1) if flags.ranks is None else flags.ranks
    if number < 1:
        raise JobError(f"--ranks {number} must be at least 1")
    return number


def with_flags(job: list[str], flags: list[str]) -> list[str]:
    """Behind the job's own, and before a subcommand as ``activation-checkpoint:full``."""
    subcommands = [n for n, word in enumerate(job) if word.startswith("activation-")]
    end = min(subcommands, default=len(job))
    return [*job[:end], *flags, *job[end:]]


def usual_degrees(config: Any, most: int) -> list[int]:
    """The job's own degree, then half and twice as often as the layout allows."""
    from torchtitan.models.common.moe import MoE

    experts = [moe.num_experts for _f, moe, _p, _a in config.traverse(MoE.Config)]
    own = config.parallelism.expert_parallel_degree
    possible = [
        2**power
        for power in range(most.bit_length())
        if most % 2**power == 0 and all(number % 2**power == 0 for number in experts)
    ]
    near = sorted((d for d in possible if d != own), key=lambda d: abs(np.log2(d / own)))
    return [own, *near[:4]]
