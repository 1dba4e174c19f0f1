"""The ``moe:`` line under each logged step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def console_line(step: int, metrics: dict[str, float], losses: Iterable[str], color: Any) -> str:
    """Format losses, MaxVio and overload factors, with torchtitan's ``Color`` or ``NoColor``."""
    shown = "".join(
        f"{color.green}{name.replace('_', ' ')}: {metrics[f'moe/{name}']:.5f}  "
        for name in losses
        if f"moe/{name}" in metrics
    )
    return (
        f"{color.red}moe:  {step:2}  {shown}"
        f"{color.orange}MaxVio: {metrics['moe/max_violation']:.4f} "
        f"(worst layer {metrics['moe/max_violation_max']:.4f})  "
        f"{color.turquoise}overload avg/max/cum: {metrics['moe/avg_overload_factor']:.2f}/"
        f"{metrics['moe/max_overload_factor']:.2f}/{metrics['moe/max_cum_overload_factor']:.2f}"
        f"{color.reset}"
    )
