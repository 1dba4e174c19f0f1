"""From the load of a step to named numbers. Pure functions; docs/telemetry.md defines each."""

from __future__ import annotations

from typing import Any

import numpy as np

from titan_moe_lb.traces.balance_statistics import (
    coefficient_of_variation,
    max_violation,
    normalized_entropy,
    num_dead_experts,
)
from titan_moe_lb.traces.step_load import StepLoad


def step_metrics(load: StepLoad, *, per_layer: bool = False) -> dict[str, float]:
    """What the sinks get, by name; empty for a model without MoE layers.

    Args:
        per_layer: also every layer's own, as ``moe/<name>_layer_<number>``.
    """
    if not load.layers:
        return {}
    of_layers = layer_metrics(load)
    metrics = {f"moe/{name}": _mean(values_M) for name, values_M in of_layers.items()}
    violation_M = of_layers["max_violation"]
    metrics["moe/max_violation_p50"] = float(np.percentile(violation_M, 50))
    metrics["moe/max_violation_p95"] = float(np.percentile(violation_M, 95))
    metrics["moe/max_violation_max"] = float(violation_M.max())
    metrics["moe/max_overload_factor"] = float(of_layers["max_overload_factor"].max())
    metrics["moe/max_cum_overload_factor"] = load.max_cum_overload_factor
    if per_layer:
        metrics |= {
            f"moe/{name}_layer_{layer}": float(value)
            for name, values_M in of_layers.items()
            for layer, value in zip(load.layers, values_M, strict=True)
            if not np.isnan(value)
        }
    return metrics


def layer_metrics(load: StepLoad) -> dict[str, np.ndarray]:
    """Every number that a layer has, by name, float64 ``(M,)``; NaN where it has none."""
    counts_ME = load.counts_ME
    return {
        **load.losses,
        "max_violation": max_violation(counts_ME),
        "max_violation_micro_batch": load.micro_batch_max_violation_M,
        "coefficient_of_variation": coefficient_of_variation(counts_ME),
        "normalized_entropy": normalized_entropy(counts_ME),
        "dead_experts": num_dead_experts(counts_ME).astype(np.float64),
        "avg_overload_factor": load.avg_overload_factor_M,
        "max_overload_factor": load.max_overload_factor_M,
    }


def console_line(step: int, metrics: dict[str, float], losses: list[str], color: Any) -> str:
    """One compact line under torchtitan's own.

    Args:
        metrics: of :func:`step_metrics`.
        losses: metric names of the aux losses to show.
        color: torchtitan's ``Color`` or ``NoColor``.
    """
    shown = "".join(f"{color.green}{name}: {metrics[f'moe/{name}']:.5f}  " for name in losses)
    return (
        f"{color.red}moe:  {step:2}  {shown}"
        f"{color.orange}max_violation: {metrics['moe/max_violation']:.4f} "
        f"(worst layer {metrics['moe/max_violation_max']:.4f})  "
        f"{color.turquoise}overload avg/max/cum: {metrics['moe/avg_overload_factor']:.2f}/"
        f"{metrics['moe/max_overload_factor']:.2f}/{metrics['moe/max_cum_overload_factor']:.2f}"
        f"{color.reset}"
    )


def _mean(values_M: np.ndarray) -> float:
    return float(np.nanmean(values_M))
