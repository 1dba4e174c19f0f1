"""MoE metrics beside torchtitan's own, through its ``MetricsProcessor``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torchtitan.components.metrics import MetricsProcessor
from torchtitan.tools.logging import logger

from titan_moe_lb.telemetry.reduction import StepLoad, reduce_step, routers_of


class LoadBalanceMetricsProcessor(MetricsProcessor):
    """Adds the raw aux losses and MaxVio of the step to every sink and to the console."""

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        pass

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        """As ``MetricsProcessor.log``. Collective: torchtitan calls it on every rank."""
        assert self.model_parts is not None
        load = reduce_step(routers_of(self.model_parts), self.parallel_dims)
        super().log(
            step,
            global_avg_loss,
            global_max_loss,
            grad_norm,
            extra_metrics={**(extra_metrics or {}), **_metrics(load)},
        )
        if load.num_layers:
            logger.info(_console_line(step, load, self.color))


def _metrics(load: StepLoad) -> dict[str, float]:
    if not load.num_layers:
        return {}
    return {
        "moe/max_violation": load.mean_max_violation,
        "moe/max_violation_worst_layer": load.worst_max_violation,
        **{f"moe/{name}": value for name, value in load.losses.items()},
    }


def _console_line(step: int, load: StepLoad, color: Any) -> str:
    losses = "".join(f"  {color.green}{name}: {value:.5f}" for name, value in load.losses.items())
    return (
        f"{color.red}moe:  {step:2}{losses}  "
        f"{color.orange}max_violation: {load.mean_max_violation:.4f}  "
        f"{color.turquoise}worst layer: {load.worst_max_violation:.4f}{color.reset}"
    )
