"""Reading and checking the flags of ``titan-moe-lb plan``."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from titan_moe_lb.commands.plan.known_hardware import hardware
from titan_moe_lb.commands.plan.plan_arguments import PlanArguments
from titan_moe_lb.commands.plan.recorded_run import loads_of_run
from titan_moe_lb.costmodel.hardware.device import Hardware
from titan_moe_lb.costmodel.loads.expert_load import TOLERANCE, WORST
from titan_moe_lb.costmodel.loads.lognormal import MOST_SIGMA, Overload, Spread
from titan_moe_lb.costmodel.times.moe_layer import MoELayer
from titan_moe_lb.costmodel.times.predict import PlannedLoads
from titan_moe_lb.errors import JobError
from titan_moe_lb.traces.trace import MOST_BYTES, Trace, read_trace

DROP_SHARE = 0.01


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Values of the flags, checked as far as possible without the job."""

    flags: PlanArguments
    factors: list[float]
    """Imbalances of the two-level load."""
    log_normal: list[Spread | Overload]
    device: Hardware
    """Device with its peaks."""
    derated: Hardware
    """Device at the assumed efficiencies."""
    degrees: list[int]
    """Expert-parallel degrees of ``--ep``; empty without the flag."""
    trace: Trace | None

    @classmethod
    def of(cls, flags: PlanArguments, imbalances: str) -> Inputs:
        """Read and check the flags, with the default of ``--imbalance``.

        Raises:
            JobError: a flag is wrong; the first one is reported.
        """
        _check(flags)
        factors, log_normal = _imbalances(flags.imbalance or imbalances)
        degrees = whole_numbers("--ep", flags.ep, ", as in 8,16,32") if flags.ep else []
        device = hardware(flags.hardware)
        trace = None
        if flags.from_run:
            trace = read_trace(flags.from_run, micro_batches=not flags.serve, most_bytes=MOST_BYTES)
        if flags.drop_share is not None and trace and not len(trace.micro_batch_counts_SME):
            raise JobError(
                "--drop-share needs loads of single micro-batches, and the trace in "
                f"{flags.from_run} has none: use a run recorded with this version"
            )
        return cls(
            flags=flags,
            factors=factors,
            log_normal=log_normal,
            device=device,
            derated=device.derated(
                compute_efficiency=flags.compute_efficiency,
                network_efficiency=flags.network_efficiency,
            ),
            degrees=degrees,
            trace=trace,
        )

    def loads(
        self, moe_layers: Mapping[int, MoELayer], degrees: Iterable[int]
    ) -> tuple[PlannedLoads, dict[str, Any] | None]:
        """Fit the loads to the layers of the model and the degrees to plan.

        Returns:
            Loads, and the facts of the run; None without one.

        Raises:
            JobError: a layer cannot be that unevenly loaded, or the run's layers are different.
        """
        self._check_layers(moe_layers)
        layers = list(moe_layers.values())
        spreads = [
            given.spread(layers) if isinstance(given, Overload) else given
            for given in self.log_normal
        ]
        redundant = self._redundant_experts(degrees)
        run, recorded = loads_of_run(self.trace, moe_layers) if self.trace else (None, None)
        loads = PlannedLoads(
            factors=self.factors,
            num_hot_experts=self.flags.hot_experts,
            spreads=spreads,
            recorded=recorded,
            redundant_experts=redundant,
            drop_share=self.flags.drop_share or DROP_SHARE,
        )
        return loads, run

    def _check_layers(self, moe_layers: Mapping[int, MoELayer]) -> None:
        hot, most = self.flags.hot_experts, max(self.factors)
        for number, layer in moe_layers.items():
            if hot > layer.top_k:
                raise JobError(
                    f"--hot-experts {hot} is above the {layer.top_k} experts that a token takes in "
                    f"layer {number}: no more can be the most loaded at once"
                )
            worst = layer.num_experts / layer.top_k
            if most > worst * (1 + TOLERANCE):
                raise JobError(
                    f"--imbalance {most:g} is above {worst:g}, the worst of layer {number}, where "
                    f"every token takes the same {layer.top_k} of {layer.num_experts} experts"
                )

    def _redundant_experts(self, degrees: Iterable[int]) -> list[int]:
        if self.flags.redundant_experts is None:
            return []
        numbers = whole_numbers("--redundant-experts", self.flags.redundant_experts)
        for degree in degrees:
            for number in numbers:
                if number % degree:
                    raise JobError(
                        f"--redundant-experts {number} is no multiple of EP {degree}: every rank "
                        "holds as many copies as the others"
                    )
        return numbers


def _check(flags: PlanArguments) -> None:
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
    if flags.measured_step is not None and not 0 < flags.measured_step < math.inf:
        raise JobError(f"--measured-step {flags.measured_step:g} must be seconds above 0")
    needs_run = {"redundant-experts": flags.redundant_experts, "drop-share": flags.drop_share}
    for name, given in needs_run.items():
        if given is not None and flags.from_run is None:
            raise JobError(f"--{name} needs the load of a run: add --from-run")
    if flags.serve:
        if flags.drop_share is not None:
            raise JobError("--drop-share is about the buffers of a training: leave out --serve")
        if flags.measured_step is not None:
            raise JobError("--measured-step is about a step of training: leave out --serve")
        if flags.ranks is not None:
            raise JobError("--ranks applies to training; with --serve, --ep sets the devices")
        return
    for name, given in {"tokens": flags.tokens, "context": flags.context}.items():
        if given is not None:
            raise JobError(f"--{name} applies to deployments: add --serve")
    if flags.dispatcher == "low_latency":
        raise JobError("--dispatcher low_latency has no backward: add --serve, or use deepep")


def _imbalances(text: str) -> tuple[list[float], list[Spread | Overload]]:
    """Split ``--imbalance`` into imbalances of the two-level load and log-normal loads."""
    factors: list[float] = []
    log_normal: list[Spread | Overload] = []
    for word in (word.strip() for word in text.split(",")):
        kind, colon, number = word.partition(":")
        try:
            if word == "worst":
                factors.append(WORST)
            elif colon and kind == "lognormal":
                log_normal.append(Spread(sigma=float(number), name=f"σ {float(number):.2f}"))
            elif colon and kind == "overload":
                overload, _at, degree = number.partition("@")
                log_normal.append(Overload(factor=float(overload), ep_degree=int(degree)))
            else:
                factors.append(float(word))
        except ValueError:
            raise JobError(
                f"--imbalance {text}: {word!r} is neither a number nor 'worst' nor lognormal:SIGMA "
                "nor overload:FACTOR@EP, with the degree at which it was measured, as in "
                "overload:1.8@8"
            ) from None
    for factor in factors:
        if not (factor == WORST or factor >= 1):
            raise JobError(f"--imbalance {factor:g} is below 1, which is balance")
    for given in log_normal:
        if isinstance(given, Spread) and not 0 <= given.sigma <= MOST_SIGMA:
            raise JobError(
                f"--imbalance lognormal:{given.sigma:g} is outside [0, {MOST_SIGMA:g}]; recorded "
                "loads have 0.1 to 1.5"
            )
        if isinstance(given, Overload) and not (given.factor >= 1 and given.ep_degree > 1):
            raise JobError(
                f"--imbalance {given}: an overload factor is at least 1, of an EP degree above 1"
            )
    return factors or [1.0], log_normal


def whole_numbers(flag: str, text: str, example: str = "") -> list[int]:
    """Parse comma-separated whole numbers of at least 1; drop duplicates and keep the order.

    Raises:
        JobError: a word is not such a number. The message names ``flag``.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise JobError(f"{flag} {text} must be whole numbers of at least 1{example}")
    return list(dict.fromkeys(int(word) for word in words))


def follows_ranks(flags: PlanArguments) -> list[str]:
    """List the flags that let a job follow ``--ranks``, unless its own flags fix its degree."""
    shard = "--parallelism.data_parallel_shard_degree"
    names = {word.partition("=")[0].replace("-", "_") for word in flags.job_flags}
    if flags.ranks is None or shard.replace("-", "_") in names:
        return []
    return [f"{shard}=-1"]


def ranks(flags: PlanArguments, of_job: int | None) -> int:
    """Resolve the number of ranks: ``--ranks``, else NGPU, else the job's own, else 1.

    Raises:
        JobError: the number is not a whole number of at least 1.
    """
    announced = os.environ.get("NGPU")
    if flags.ranks is None and announced and not announced.isdecimal():
        raise JobError(f"NGPU={announced} must be a whole number of at least 1")
    number = int(announced or of_job or 1) if flags.ranks is None else flags.ranks
    if number < 1:
        raise JobError(f"--ranks {number} must be at least 1")
    return number


def with_flags(job: list[str], flags: list[str]) -> list[str]:
    """Insert flags after the job's own, before a subcommand (``activation-checkpoint:full``)."""
    subcommands = [n for n, word in enumerate(job) if word.startswith("activation-")]
    end = min(subcommands, default=len(job))
    return [*job[:end], *flags, *job[end:]]


def usual_degrees(own: int, layers: Sequence[MoELayer], most: int) -> list[int]:
    """List the job's own degree, then the four nearest powers of two that the layout allows.

    A degree divides ``most`` ranks, and the experts of every layer.
    """
    common = math.gcd(most, *(layer.num_experts for layer in layers))
    possible = [2**power for power in range(common.bit_length()) if common % 2**power == 0]
    near = sorted(
        (degree for degree in possible if degree != own),
        key=lambda degree: abs(math.log2(degree / own)),
    )
    return [own, *near[:4]]
