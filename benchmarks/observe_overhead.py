"""Time that ``observe`` adds to a training step on the host.

    OMP_NUM_THREADS=1 python -m benchmarks.observe_overhead [--repeats 40]

Trains two equal Qwen3-MoE models of transformers in turn, one of them observed, with a trace and
metrics in every step. Prints a table: the ratio is the median over repeats of an observed step to
the plain one of the same repeat.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.device_time import interleaved
from titan_moe_lb import observe

SHAPES = ((8, 64, 4, 256), (4, 32, 2, 256))
"""Layers, experts, sequences, and their tokens."""


@dataclass
class Arguments:
    """Flags of the benchmark."""

    repeats: int = 40


def main() -> None:
    """Measure both shapes, and print the table."""
    arguments = tyro.cli(Arguments)
    torch.set_num_threads(1)
    print("| layers | experts | tokens | step | observed, of the plain step | quartiles |")
    print("|---|---|---|---|---|---|")
    for layers, experts, sequences, length in SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            steps = {
                "plain": _step(layers, experts, (sequences, length), None),
                "observed": _step(layers, experts, (sequences, length), folder),
            }
            seconds = interleaved(steps, arguments.repeats, torch.device("cpu"))
        pairs = zip(seconds["observed"], seconds["plain"], strict=True)
        low, middle, high = statistics.quantiles([own / base for own, base in pairs], n=4)
        print(
            f"| {layers} | {experts} | {sequences * length:,} "
            f"| {statistics.median(seconds['plain']) * 1e3:.0f} ms "
            f"| {middle:.3f} | {low:.3f} to {high:.3f} |"
        )


def _step(
    layers: int, experts: int, shape: tuple[int, int], folder: str | None
) -> Callable[[], None]:
    """Build a model, and return its training step; with a folder, it is observed."""
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=1024,
            hidden_size=256,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            num_experts=experts,
            num_experts_per_tok=8,
            moe_intermediate_size=128,
        )
    ).train()
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(0, 1024, shape)
    observed = None if folder is None else observe(model, folder)
    number = 0

    def step() -> None:
        nonlocal number
        number += 1
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if observed is not None:
            observed.step(number, loss=loss.item())

    return step


if __name__ == "__main__":
    main()
