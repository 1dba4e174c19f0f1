"""From the load of a step to named numbers. Pure functions; docs/telemetry.md defines each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from titan_moe_lb.traces.balance_statistics import (
    coefficient_of_variation,
    max_violation,
    normalized_entropy,
    num_dead_experts,
    relative_load,
)
from titan_moe_lb.traces.column import Column
from titan_moe_lb.traces.domain_trace import DomainLoad
from titan_moe_lb.traces.step_load import StepLoad

OF_COUNTS = {
    "max_violation": max_violation,
    "coefficient_of_variation": coefficient_of_variation,
    "normalized_entropy": normalized_entropy,
    "dead_experts": num_dead_experts,
}
"""What follows from the counts of a layer alone, and so is in no column of the trace."""
_WITHOUT_PERCENTILES = ("normalized_entropy", "dead_experts")
"""A high entropy is a good one, and a count of few layers has no percentiles to speak of."""


def step_metrics(
    load: StepLoad,
    figures: Iterable[Column],
    *,
    num_extreme_experts: int = 0,
    per_layer: bool = False,
) -> dict[str, float]:
    """What the sinks get, by name; empty for a model without MoE layers, and for a step in which
    nothing was routed.

    How many names there are depends on the figures, not on the number of experts.

    Args:
        figures: declarations of what the load holds.
        num_extreme_experts: name that many of the hottest and of the coldest experts.
        per_layer: also every layer's own, as ``moe/<name>_layer_<number>``.
    """
    if not load.counts_ME.any():
        return {}
    figures = [*figures, *map(Column, OF_COUNTS)]
    of_layers = load.figures | {name: f(load.counts_ME) for name, f in OF_COUNTS.items()}
    metrics = {
        figure.name: load.step_columns[figure.name]
        for figure in figures
        if figure.per == "step" and figure.name in load.step_columns
    }
    for figure in figures:
        values_M = of_layers.get(figure.name)
        if values_M is None or np.isnan(values_M).all():
            continue
        metrics[figure.name] = float(figure.over_layers(values_M))
        if figure.summary != "sum" and figure.name not in _WITHOUT_PERCENTILES:
            known = values_M[~np.isnan(values_M)]
            for suffix, percent in (("p50", 50), ("p95", 95), ("max", 100)):
                if suffix != figure.summary:
                    metrics[f"{figure.name}_{suffix}"] = np.percentile(known, percent)
        if per_layer:
            metrics |= {
                f"{figure.name}_layer_{layer}": value
                for layer, value in zip(load.layers, values_M, strict=True)
                if not np.isnan(value)
            }
    metrics |= _extreme_experts(load, num_extreme_experts)
    return {f"moe/{name}": float(value) for name, value in metrics.items()}


def _extreme_experts(load: StepLoad, number: int) -> dict[str, float]:
    """``hottest_1_load`` (relative to the balanced load), ``_layer`` and ``_expert``, and so on."""
    load_ME = relative_load(load.counts_ME)
    # What a layer does not have is NaN, and sorted to the end.
    order = np.argsort(load_ME, axis=None, kind="stable")[: np.isfinite(load_ME).sum()]
    metrics = {}
    for end, listed in (("hottest", order[::-1]), ("coldest", order)):
        for place, index in enumerate(listed[:number].tolist(), start=1):
            row, expert = divmod(index, load_ME.shape[1])
            metrics[f"{end}_{place}_load"] = load_ME[row, expert]
            metrics[f"{end}_{place}_layer"] = load.layers[row]
            metrics[f"{end}_{place}_expert"] = expert
    return metrics


def domain_metrics(loads: dict[str, DomainLoad]) -> dict[str, float]:
    """What the sinks get of a validation: loss, and MaxVio mean over layers, by domain."""
    return {
        f"validation_metrics/{name}_{domain}": float(value)
        for domain, load in loads.items()
        for name, value in (
            ("loss", load.loss),
            ("max_violation", max_violation(load.counts_ME).mean()),
        )
    }


def console_line(step: int, metrics: dict[str, float], losses: Iterable[str], color: Any) -> str:
    """One compact line under torchtitan's own.

    Args:
        metrics: of :func:`step_metrics`.
        losses: metric names of the aux losses to show.
        color: torchtitan's ``Color`` or ``NoColor``.
    """
    shown = "".join(
        f"{color.green}{name}: {metrics[f'moe/{name}']:.5f}  "
        for name in losses
        if f"moe/{name}" in metrics
    )
    return (
        f"{color.red}moe:  {step:2}  {shown}"
        f"{color.orange}max_violation: {metrics['moe/max_violation']:.4f} "
        f"(worst layer {metrics['moe/max_violation_max']:.4f})  "
        f"{color.turquoise}overload avg/max/cum: {metrics['moe/avg_overload_factor']:.2f}/"
        f"{metrics['moe/max_overload_factor']:.2f}/{metrics['moe/max_cum_overload_factor']:.2f}"
        f"{color.reset}"
    )
