"""Compare one layout with a single process and print one JSON line."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Literal

import tyro

from tests.gpus import GPUS
from tests.parity.compare import Parity
from tests.parity.gradients import make_config
from tests.parity.layout import parse
from tests.rank_pool import RankPool
from titan_moe_lb.errors import JobError
from titan_moe_lb.rules import validate


@dataclass
class Arguments:
    layout: str = ""
    """Keys: pp, schedule, dp_shard, dp_replicate, tp, cp, ep, microbatch, accumulate, ac
    (none, full, selective), compile, backend (of compile), spmd_backend, sequence_parallel, length (tokens of a sequence)."""

    loss: str = "sequence_wise"
    """Type of the aux loss; several with commas."""

    weight: float = 0.1
    """Weight of each loss."""

    module: str = "deepseek_v3"
    config: str = "deepseek_v3_tiny"
    tolerance: float = 1e-5
    with_main_loss: bool = False
    """Compare the gradient of the language-model loss and the aux losses together."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Ranks on the host over gloo, or one a GPU over NCCL."""


def main() -> None:
    arguments = tyro.cli(Arguments)
    try:
        layout = parse(arguments.layout)
    except (ValueError, KeyError) as error:
        sys.exit(f"tests.parity: error: {error}")
    losses = [{"type": kind, "weight": arguments.weight} for kind in arguments.loss.split(",")]
    model = {"aux_losses": losses}
    os.environ["WORLD_SIZE"] = str(layout.num_ranks)
    try:
        validate(make_config(layout, arguments.module, arguments.config, model))
    except JobError as error:
        sys.exit(f"tests.parity: error: {error}")
    gpus = GPUS if arguments.device == "cuda" else None
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
        ) as parity,
    ):
        (comparison,) = parity.compare(layout)
    comparison.loss = arguments.loss
    print(comparison.line())
    sys.exit(comparison.max_relative_error > arguments.tolerance)


if __name__ == "__main__":
    main()
