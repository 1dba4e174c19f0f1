"""Answer of ``titan-moe-lb plan --serve``: verdict, table and charts."""

from __future__ import annotations

import math
from collections.abc import Callable

from titan_moe_lb.commands.answer.answer import Answer, Column, Row, Table
from titan_moe_lb.commands.answer.words import GIB, duration, memory, number
from titan_moe_lb.commands.plan.answer import device_sources, efficiencies, usable_memory
from titan_moe_lb.commands.plan.charts import curves_by_degree
from titan_moe_lb.commands.plan.serving.result import Choice, Serving
from titan_moe_lb.costmodel.times.serving import ServedDegree, ServedRow, ServedStep
from titan_moe_lb.pages.charts import Chart, Panel


def answer(serving: Serving) -> Answer:
    """Convert the plan of a deployment to sentences, a table and charts."""
    model = serving.model
    return Answer(
        kind="Plan of a deployment",
        title=f"{model.model_name} {model.flavor}, {serving.device.name}",
        verdict=_verdict(serving),
        headline=_headline(serving),
        sections=[lambda: _charts(serving), _table(serving)],
        footer=device_sources(serving.device),
        numbers=serving.as_json(),
    )


def _verdict(serving: Serving) -> list[str]:
    load = serving.judged.description
    most, least, ahead = serving.best().values()
    if not (most and least and ahead):
        return [
            f"Verdict: under {load} nothing fits in {serving.usable_bytes / GIB:.1f} GiB. More "
            "devices in the expert-parallel group, a shorter --context, or fewer --tokens."
        ]
    return [
        f"Verdict: under {load}, EP {most.ep_degree} decodes most: {_speed(most)}, with "
        f"{most.row.tokens:,} sequences of {serving.context:,} tokens on each device"
        f"{_of_room(serving, most)}, "
        f"{duration(most.row.decode.step_seconds)} a token, and "
        f"{number(most.row.decode.memory_bytes / GIB)} GiB.",
        f"Shortest step: {duration(least.row.decode.step_seconds)} a token, EP {least.ep_degree} "
        f"with {least.row.tokens:,} on each device ({_speed(least)}).",
        f"Prefill: EP {ahead.ep_degree} with {ahead.row.tokens:,} tokens on each device, "
        f"{number(ahead.row.prefill.tokens_per_second)} tokens/s a device.",
        "How sure: times are lower bounds, without kernel launches, sampling and scheduling; "
        "weights and caches are in BF16; absolute times depend on the assumed efficiencies "
        "(docs/explain/cost_model.md).",
    ]


def _of_room(serving: Serving, choice: Choice) -> str:
    room = {degree.ep_degree: degree.most_sequences for degree in serving.degrees}
    most = room[choice.ep_degree]
    return " (all that fit)" if choice.row.tokens == most else f" ({most:,} fit)"


def _speed(choice: Choice) -> str:
    return f"{number(choice.row.decode.tokens_per_second)} tokens/s a device"


def _headline(serving: Serving) -> list[str]:
    model, device = serving.model, serving.device
    layer = next(iter(model.moe_layers.values()))
    per_token = model.cache_bytes(serving.context) / serving.context
    lines = [
        f"{model.model_name} {model.flavor} on {device.name}: {len(model.expert_bytes)} MoE layers of "
        f"{len(model.layers)}, {layer.num_experts} experts, top {layer.top_k}; caches of "
        f"{per_token / 1024:.1f} KiB a token, {number(serving.context * per_token / GIB)} GiB a "
        f"sequence of {serving.context:,}.",
        f"Tokens are those of one device in a step; {usable_memory(serving.usable_bytes, device)}; "
        f"{efficiencies(serving.flags)}.",
    ]
    if serving.run:
        lines.append(
            f"Placements are computed for the loads of the last steps of {serving.run['path']}, and used for them."
        )
    return lines


def _table(serving: Serving) -> Table:
    milliseconds = ("experts", "exchange", "cache", "decode")
    return Table(
        title="Every degree and number of tokens",
        columns=(
            Column(title="EP"),
            Column(title="load"),
            Column(title="tokens", show="{:,}".format),
            Column(title="active experts", show=number),
            *(Column(title=title, unit="ms", show=number) for title in milliseconds),
            Column(title="decode tokens/s", show=number),
            Column(title="memory", unit="GiB", show=number),
            Column(title="prefill", unit="ms", show=number),
            Column(title="prefill tokens/s", show=number),
        ),
        groups=[[_row(degree.ep_degree, row) for row in degree.rows] for degree in serving.degrees],
        text=[
            "Times of a whole step on the busiest device: experts and exchange (dispatch and combine) of "
            "all MoE layers, cache of all layers in decoding; decode and prefill are the sums, with linear "
            "layers. Active experts: those of a device and layer with work. Tokens/s: of one device. "
            "Memory: of decoding."
        ],
        notes=[_limits(serving, degree) for degree in serving.degrees],
    )


def _row(ep_degree: int, row: ServedRow) -> Row:
    return (
        ep_degree,
        row.load,
        row.tokens,
        row.active_experts,
        row.experts_seconds * 1e3,
        row.exchange_seconds * 1e3,
        row.decode.cache_seconds * 1e3,
        row.decode.step_seconds * 1e3,
        row.decode.tokens_per_second,
        memory(row.decode.memory_bytes, row.decode.fits),
        row.prefill.step_seconds * 1e3,
        row.prefill.tokens_per_second,
    )


def _limits(serving: Serving, degree: ServedDegree) -> str:
    """Describe how many sequences fit, and the bottleneck of the experts."""
    turn = (
        "reading the experts is the limit at any number of tokens"
        if degree.turning_tokens is None
        else f"reading the experts is the limit up to {math.ceil(degree.turning_tokens):,} tokens on a "
        "device, then their arithmetic"
    )
    room = (
        f"weights of {number(degree.weight_bytes / GIB)} GiB leave room for "
        f"{degree.most_sequences:,} sequences of {serving.context:,}"
        if degree.weight_bytes <= serving.usable_bytes
        else f"weights of {number(degree.weight_bytes / GIB)} GiB do not fit"
    )
    return f"EP {degree.ep_degree}: {room}; {turn}."


def _charts(serving: Serving) -> list[Chart]:
    """Chart time, throughput and memory over the tokens of a step, under the judged load."""

    def panel(caption: str, unit: str, value: Callable[[ServedRow], float]) -> Panel:
        curves = {
            degree.ep_degree: [
                (row.tokens, value(row)) for row in degree.rows if row.load == serving.judged.name
            ]
            for degree in serving.degrees
        }
        ticks = sorted({row.tokens for row in serving.degrees[0].rows})
        return Panel(
            caption,
            curves_by_degree(
                curves, y_title=unit, x_title="tokens of a device in a step", ticks=ticks
            ),
        )

    def step(of: Callable[[ServedRow], ServedStep]) -> list[Panel]:
        return [
            panel("a step", "ms", lambda row: of(row).step_seconds * 1e3),
            panel("tokens a second", "tokens/s", lambda row: of(row).tokens_per_second),
        ]

    return [
        Chart(
            "Decode",
            f"One token of each sequence of {serving.context:,}, under the load "
            f"{serving.judged.name}: how long a step takes, and how many tokens a device makes in a "
            "second.",
            step(lambda row: row.decode),
        ),
        Chart(
            "Prefill",
            "One step with so many tokens of prompts of that length.",
            step(lambda row: row.prefill),
        ),
        Chart(
            "Memory",
            "Weights, and the caches of as many sequences as tokens. Usable: "
            f"{serving.usable_bytes / GIB:.1f} GiB.",
            [panel("", "GiB", lambda row: row.decode.memory_bytes / GIB)],
        ),
    ]
