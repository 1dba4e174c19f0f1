"""Compare one layout with a single process and print one JSON line; or many, drawn at random."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from typing import Literal

import tyro

from tests.parity import random_layouts
from tests.parity.balance import WEIGHT, Balance
from tests.parity.compare import TOLERANCE, Parity
from tests.parity.gradients import make_config
from tests.parity.layout import parse
from tests.support.gpus import GPUS
from tests.support.rank_pool import RankPool
from titan_moe_lb.errors import JobError
from titan_moe_lb.resolved_job import Job
from titan_moe_lb.rules import validate


@dataclass
class Arguments:
    layout: str = ""
    """Keys: pp, schedule, dp_shard, dp_replicate, tp, cp, ep, microbatch, accumulate, ac (none,
    full, selective), compile, backend (of compile), spmd_backend, sequence_parallel, length
    (tokens of a sequence)."""

    loss: str = "sequence_wise"
    """Type of the aux loss; several with commas."""

    weight: float = WEIGHT
    """Weight of each loss; the z-loss has a hundredth of it."""

    bias: str = ""
    """Rule of the expert bias: none, sign, proportional, momentum, quantile, quantile_trend.
    Empty: the model's."""

    score_func: str = ""
    """softmax, sigmoid or sqrtsoftplus. Empty: that of the model."""

    padded: bool = False
    """40 % of the batch is padding. The reference is the batch without it."""

    module: str = "deepseek_v3"
    config: str = "deepseek_v3_tiny"
    tolerance: float = TOLERANCE
    with_main_loss: bool = False
    """Compare the gradient of the language-model loss and the aux losses together."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Ranks on the host over gloo, or one a GPU over NCCL."""

    random: int = 0
    """Number of layouts to draw, with their losses, rule and padding, instead of one."""

    seed: int = 0
    """Seed of the draw."""

    ranks: int = 4
    """Most ranks of a drawn layout."""


def main() -> None:
    arguments = tyro.cli(Arguments)
    gpus = GPUS if arguments.device == "cuda" else None
    if arguments.random:
        ranks = arguments.ranks if gpus is None else min(arguments.ranks, len(gpus))
        with RankPool(ranks, gpus) as pool:
            outcome = random_layouts.run(pool, arguments.random, arguments.seed)
        print(json.dumps({"seed": arguments.seed, **dataclasses.asdict(outcome)}))
        sys.exit(bool(outcome.failures))
    try:
        layout = parse(arguments.layout)
    except (ValueError, KeyError) as error:
        sys.exit(f"tests.parity: error: {error}")
    balance = Balance(
        tuple(arguments.loss.split(",")), arguments.bias, arguments.padded, arguments.score_func
    )
    model = balance.model(arguments.weight)
    try:
        config = make_config(layout, arguments.module, arguments.config, model)
        validate(Job.of(config, layout.num_ranks))
    except JobError as error:
        sys.exit(f"tests.parity: error: {error}")
    if gpus is not None and layout.num_ranks > len(gpus):
        sys.exit(
            f"tests.parity: error: the layout needs {layout.num_ranks} GPU(s), {len(gpus)} are here"
        )
    with (
        RankPool(layout.num_ranks, gpus) as pool,
        Parity(
            pool,
            model,
            module=arguments.module,
            config=arguments.config,
            with_main_loss=arguments.with_main_loss,
            padded=arguments.padded,
        ) as parity,
    ):
        (comparison,) = parity.compare(layout)
    comparison.loss = arguments.loss
    print(comparison.line())
    found = comparison.faults(arguments.tolerance)
    sys.exit(f"differs in {', '.join(found)}" if found else 0)


if __name__ == "__main__":
    main()
