"""Named numbers of a step for TensorBoard, W&B, ``Balance.metrics()`` and the ``moe:`` line."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from titan_moe_lb.telemetry.metrics.margin import MARGIN_BELOW
from titan_moe_lb.telemetry.metrics.of_counts import OF_COUNTS
from titan_moe_lb.traces.balance_statistics import extreme_experts, max_violation, relative_load
from titan_moe_lb.traces.columns import Column
from titan_moe_lb.traces.domain_trace import DomainLoad
from titan_moe_lb.traces.step_load import StepLoad

_PERCENTILES = {"p50": 50, "p95": 95, "max": 100}
"""Suffix of a name to a percentile over the layers."""

_WITHOUT_PERCENTILES = {"normalized_entropy", "dead_experts", *(kind.name for kind in MARGIN_BELOW)}
"""Metrics without percentiles over the layers.

High entropy is good, so its high percentiles are useless. Few layers have dead experts. The shares of
a margin are a distribution already.
"""


def sink_metrics(
    load: StepLoad,
    columns: Iterable[Column],
    *,
    num_extreme_experts: int = 0,
    per_layer: bool = False,
) -> dict[str, float]:
    """Compute the named numbers of a step, summarised over the layers.

    ``per_layer`` adds the number of each layer, as ``moe/<name>_layer_<number>``.

    Returns:
        Name to number; empty for a model without MoE layers and for a step that routed nothing.
    """
    if not load.counts_ME.any():
        return {}
    of_layers = load.layer_columns | {name: f(load.counts_ME) for name, f in OF_COUNTS.items()}
    metrics = dict(load.step_columns)
    for column in (*columns, *map(Column, OF_COUNTS)):
        values_M = of_layers.get(column.name)
        if values_M is None or np.isnan(values_M).all():
            continue
        metrics[column.name] = float(column.over_layers(values_M))
        if column.summary != "sum" and column.name not in _WITHOUT_PERCENTILES:
            for suffix, percent in _PERCENTILES.items():
                if suffix != column.summary:
                    metrics[f"{column.name}_{suffix}"] = np.nanpercentile(values_M, percent)
        if per_layer:
            metrics |= {
                f"{column.name}_layer_{layer}": value
                for layer, value in zip(load.layers, values_M, strict=True)
                if not np.isnan(value)
            }
    metrics |= _extreme_experts(load, num_extreme_experts)
    return {f"moe/{name}": float(value) for name, value in metrics.items()}


def _extreme_experts(load: StepLoad, number: int) -> dict[str, float]:
    """Name the hottest and coldest experts: ``hottest_1_load``, ``_layer``, ``_expert``, and so on.

    Loads are relative to the balanced load.
    """
    load_ME = relative_load(load.counts_ME)
    metrics = {}
    for end, experts in zip(("hottest", "coldest"), extreme_experts(load_ME, number), strict=True):
        for place, (row, expert) in enumerate(experts, start=1):
            metrics[f"{end}_{place}_load"] = load_ME[row, expert]
            metrics[f"{end}_{place}_layer"] = load.layers[row]
            metrics[f"{end}_{place}_expert"] = expert
    return metrics


def domain_metrics(loads: dict[str, DomainLoad]) -> dict[str, float]:
    """Compute the loss and the mean MaxVio over the layers of each validated domain."""
    return {
        f"validation_metrics/{name}_{domain}": float(value)
        for domain, load in loads.items()
        for name, value in (
            ("loss", load.loss),
            ("max_violation", max_violation(load.counts_ME).mean()),
        )
    }
