"""A deployment in the terminal."""

from __future__ import annotations

import math

from rich import box
from rich.table import Table

from titan_moe_lb.commands.plan.sentences import GIB, duration, efficiencies, number, usable_memory
from titan_moe_lb.commands.plan.serving.answer import Choice, Serving
from titan_moe_lb.commands.plan.table import say, terminal
from titan_moe_lb.costmodel.times.serving import ServedDegree, ServedRow

COLUMNS = (
    "load",
    "tokens",
    "active",
    "experts ms",
    "exchange ms",
    "cache ms",
    "decode ms",
    "decode/s",
    "GiB",
    "prefill ms",
    "prefill/s",
)


def print_serving(answer: Serving) -> None:
    """Print the verdict and the table of every degree."""
    console = terminal()
    say(console, [*verdict(answer), *headline(answer)])
    table = Table(box=box.SIMPLE)
    for name in ("EP", *COLUMNS):
        table.add_column(name, justify="right", overflow="fold")
    for degree in answer.degrees:
        for row in degree.rows:
            *others, memory, ahead, per_second = cells(row)
            table.add_row(
                str(degree.ep_degree),
                *others,
                memory if row.decode.fits else f"[red]{memory}[/red]",
                ahead,
                per_second,
            )
        table.add_section()
    console.print(table)
    say(console, [limits(answer, degree) for degree in answer.degrees])


def verdict(answer: Serving) -> list[str]:
    """What to do, and how sure that is."""
    load = answer.judged.said
    most, least = answer.most_decoded, answer.shortest_step
    ahead = answer.most_prefilled
    if not (most and least and ahead):
        return [
            f"Verdict: under {load} nothing fits in {answer.usable_bytes / GIB:.1f} GiB. More "
            "devices in the expert-parallel group, a shorter --context, or fewer --tokens"
        ]
    return [
        f"Verdict: under {load} EP {most.ep_degree} decodes most: {_speed(most)} with "
        f"{most.row.tokens:,} sequences of {answer.context:,} tokens on each, "
        f"{duration(most.row.decode.step_seconds)} a token; {number(most.row.decode.memory_bytes / GIB)} GiB",
        f"Shortest step: {duration(least.row.decode.step_seconds)} a token, EP {least.ep_degree} "
        f"with {least.row.tokens:,} on each device ({_speed(least)})",
        f"Prefill: EP {ahead.ep_degree} with {ahead.row.tokens:,} tokens on each device, "
        f"{number(ahead.row.prefill.tokens_per_second)} tokens/s a device",
        "How sure: a lower bound of the time, without the start of kernels, sampling and scheduling; "
        "weights and caches in BF16; absolute times rest on the assumed efficiencies (docs/planning.md)",
    ]


def _speed(choice: Choice) -> str:
    return f"{number(choice.row.decode.tokens_per_second)} tokens/s a device"


def headline(answer: Serving) -> list[str]:
    """What was asked of what, in sentences."""
    model, device = answer.model, answer.device
    layer = next(iter(model.moe_layers.values()))
    per_token = model.cache_bytes(answer.context) / answer.context
    lines = [
        f"{model.model_name} {model.flavor} on {device.name}: {len(model.expert_bytes)} MoE layers of "
        f"{len(model.layers)}, {layer.num_experts} experts, top {layer.top_k}; caches of "
        f"{per_token / 1024:.1f} KiB a token, {number(answer.context * per_token / GIB)} GiB a sequence of "
        f"{answer.context:,}",
        f"{usable_memory(answer.usable_bytes, device)}; {efficiencies(answer.flags)}; tokens are "
        "those of one device in a step",
    ]
    if answer.run:
        lines.append(
            f"placements are for the loads of {answer.run['path']}, its last steps, and judged by them"
        )
    return lines


def cells(row: ServedRow) -> list[str]:
    """What the columns show."""
    return [
        row.load,
        f"{row.tokens:,}",
        number(row.active_experts),
        *(
            number(seconds * 1e3)
            for seconds in (row.experts_seconds, row.exchange_seconds, row.decode.cache_seconds)
        ),
        number(row.decode.step_seconds * 1e3),
        number(row.decode.tokens_per_second),
        number(row.decode.memory_bytes / GIB) + ("" if row.decode.fits else " no"),
        number(row.prefill.step_seconds * 1e3),
        number(row.prefill.tokens_per_second),
    ]


def limits(answer: Serving, degree: ServedDegree) -> str:
    """How many sequences fit, and what limits the experts, in a sentence."""
    turn = (
        "reading the experts is the limit at any number of tokens"
        if degree.turning_tokens is None
        else f"reading the experts is the limit up to {math.ceil(degree.turning_tokens):,} tokens on a "
        "device, then their arithmetic"
    )
    room = (
        f"weights of {number(degree.weight_bytes / GIB)} GiB leave room for "
        f"{degree.most_sequences:,} sequences of {answer.context:,}"
        if degree.weight_bytes <= answer.usable_bytes
        else f"weights of {number(degree.weight_bytes / GIB)} GiB do not fit"
    )
    return f"EP {degree.ep_degree}: {room}; {turn}"
