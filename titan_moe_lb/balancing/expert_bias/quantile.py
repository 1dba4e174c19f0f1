"""Quantile balancing: the bias with which the step would have been balanced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from titan_moe_lb.balancing.expert_bias.base import BiasStep, ExpertBias
from titan_moe_lb.errors import JobError


class QuantileBias(ExpertBias):
    """``b_i`` becomes the K/E-quantile, over the tokens of a step, of the bias ``r(t,i)`` that a
    token requires to select expert i; less the mean over the experts.

    ``r(t,i) = alpha(t) - s(t,i)`` with ``alpha(t)`` the (K+1)-th largest of ``s(t,.) + b``:
    a token selects the experts whose bias is above it. Source: Kimi K3 technical report,
    section 2.3.3, Eqs. 13 and 14, appendices C and D; with group-limited routing r is
    ours (:func:`titan_moe_lb.balancing.expert_bias.required.required_bias`).

    The quantile is found in a histogram of ``num_bins`` bins on ``b_i +- (max b - min b + 2)``,
    outside which no r can be, and interpolated within its bin: counts of tokens are summed
    over the ranks, not quantiles averaged. The report's bins are uniform. Here they are so
    in ``asinh((r - b_i) / 1e-3)``: as fine as 2e-5 where the bias is and the quantile goes,
    and coarser away from it. The bias itself is the middle of a bin, because every runner-up
    requires just that. Uniform ones of 2e-3 are wider than what separates the scores of a
    softmax over many experts.

    Fixed point: every expert is selected by K/E of the tokens. No speed has to be chosen.
    With K = E there is no choice, and the bias rests.
    """

    type_name: ClassVar[str] = "quantile"
    filled_by_job: ClassVar[frozenset[str]] = ExpertBias.filled_by_job | {"changes"}

    @dataclass(kw_only=True, slots=True)
    class Config(ExpertBias.Config):
        num_bins: int = 1000
        """Bins of each expert's histogram. Memory: 20 E num_bins bytes a layer."""

        ema: float = 0.0
        """Share of the bias that is kept, in [0, 1): the rest is the new quantile."""

        def __post_init__(self) -> None:
            if self.num_bins < 2:
                raise JobError(
                    f"expert_bias quantile has num_bins {self.num_bins}; it must be at least 2 "
                    "(the Kimi K3 report takes 1000)"
                )
            if not 0 <= self.ema < 1:
                raise JobError(f"expert_bias quantile has ema {self.ema}; it must be in [0, 1)")

    @property
    def num_bins(self) -> int:
        return self.config.num_bins if self.config.top_k != self.config.num_experts else 0

    def observe(self, histogram_EH, required_BLE, bias_E, number) -> None:
        num_experts, num_bins = histogram_EH.shape
        place_BLE = torch.asinh((required_BLE - bias_E) / _FINE) / _reach(bias_E)
        bins_BLE = place_BLE.mul_((num_bins - 1) / 2).add_(num_bins // 2 + 0.5)
        bins_BLE = bins_BLE.clamp_(0, num_bins - 1)
        # Scores that are not numbers ask for nothing: the middle bin leaves the bias as it is.
        bins_BLE = bins_BLE.nan_to_num_(num_bins // 2).long()
        bins_BLE += torch.arange(num_experts, device=bins_BLE.device) * num_bins
        number_N = number.expand_as(bins_BLE).flatten()
        histogram_EH.view(-1).scatter_add_(0, bins_BLE.flatten(), number_N)

    def delta(self, step: BiasStep) -> torch.Tensor:
        if step.histogram_NEH is None:
            return torch.zeros_like(step.bias_NE)
        return (self.quantile(step) - step.bias_NE) * (1 - self.config.ema)

    def quantile(self, step: BiasStep) -> torch.Tensor:
        """The bias with which the step would have been balanced, less its mean.
        float32 ``(N, E)``."""
        assert step.histogram_NEH is not None
        assert self.config.top_k is not None
        num_experts, num_bins = step.histogram_NEH.shape[1:]
        below_NEH = step.histogram_NEH.cumsum(dim=-1)
        total_NE1 = below_NEH[..., -1:]
        # float64, as float32 would round numbers of tokens beyond 2**24.
        target_NE1 = total_NE1.double() * (self.config.top_k / num_experts)
        # The first bin at whose end the target is reached.
        bin_NE1 = (below_NEH < target_NE1).sum(dim=-1, keepdim=True)
        bin_NE1 = bin_NE1.clamp_(max=num_bins - 1)
        in_bin_NE1 = step.histogram_NEH.gather(-1, bin_NE1)
        before_NE1 = below_NEH.gather(-1, bin_NE1) - in_bin_NE1
        within_NE1 = (target_NE1 - before_NE1) / in_bin_NE1.clamp(min=1)
        place_NE = (bin_NE1 + within_NE1).squeeze(-1) - (num_bins // 2 + 0.5)
        place_NE *= 2 / (num_bins - 1)
        quantile_NE = step.bias_NE + torch.sinh(place_NE * _reach(step.bias_NE.double())) * _FINE
        quantile_NE -= quantile_NE.mean(dim=-1, keepdim=True)
        return quantile_NE.float()


_FINE = 1e-3
"""How far from the bias the bins begin to grow."""


def _reach(bias: torch.Tensor) -> torch.Tensor:
    """asinh of the largest distance of a required bias from any bias, ``(..., 1)``."""
    low, high = bias.aminmax(dim=-1, keepdim=True)
    return torch.asinh((high - low + 2) / _FINE)
