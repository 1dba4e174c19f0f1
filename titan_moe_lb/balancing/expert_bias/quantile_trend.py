"""Quantile balancing with a forecast for the next step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from titan_moe_lb.balancing.expert_bias.base import BiasStep
from titan_moe_lb.balancing.expert_bias.quantile import QuantileBias
from titan_moe_lb.errors import JobError


class QuantileTrendBias(QuantileBias):
    """Quantile ``q`` of :class:`QuantileBias`, extrapolated to the next step.

    While the router learns, the bias that balances it changes, and a bias computed from one step
    lags behind in the next. Holt's linear trend (double exponential smoothing) forecasts it:

        level = ema * b + (1 - ema) * q
        trend = trend_ema * trend + (1 - trend_ema) * (level - last level)
        b = level + trend

    The rule is ours; docs/evidence/study.md measures its gain. It has the fixed point of
    ``quantile``, with a trend of 0.
    """

    type_name: ClassVar[str] = "quantile_trend"
    state_names: ClassVar[tuple[str, ...]] = ("trend_E",)

    @dataclass(kw_only=True, slots=True)
    class Config(QuantileBias.Config):
        trend_ema: float = 0.7
        """Weight of the last trend in the new one, in [0, 1)."""

        def __post_init__(self) -> None:
            QuantileBias.Config.__post_init__(self)
            if not 0 <= self.trend_ema < 1:
                raise JobError(
                    f"expert_bias quantile_trend has trend_ema {self.trend_ema}; it must be in [0, 1)"
                )

    def delta(self, step: BiasStep) -> torch.Tensor:
        """Update the trend, and compute the update from the bias to level plus trend."""
        if step.histogram_NEH is None:
            return torch.zeros_like(step.bias_NE)
        trend_NE = step.state["trend_E"]
        level_NE = step.bias_NE.lerp(self.quantile(step), 1 - self.config.ema)
        # The first update of a zero bias is not a trend.
        begun_N1 = step.bias_NE.any(dim=-1, keepdim=True)
        rise_NE = (level_NE - (step.bias_NE - trend_NE)) * begun_N1
        trend_NE.lerp_(rise_NE, 1 - self.config.trend_ema)
        return level_NE + trend_NE - step.bias_NE
