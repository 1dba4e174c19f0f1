"""Quantile balancing: a rule that computes the bias that would have balanced the step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from titan_moe_lb.balancing.expert_bias.base import BiasStep, ExpertBias
from titan_moe_lb.balancing.score_functions import LARGEST_SCORE
from titan_moe_lb.errors import JobError


class QuantileBias(ExpertBias):
    """K/E-quantile, over the tokens of a step, of the bias ``r(t,i)`` required to select expert i.

    The new ``b_i`` is this quantile less its mean over the experts. ``r(t,i) = alpha(t) - s(t,i)``,
    where ``alpha(t)`` is the (K+1)-th largest of ``s(t,.) + b``: a token selects the experts whose
    bias is above r. Source: Kimi K3 technical report, section 2.3.3, Eqs. 13 and 14, appendices C
    and D. With group-limited routing the definition of r is ours
    (:func:`titan_moe_lb.balancing.expert_bias.required.required_bias`).

    The quantile is interpolated in a histogram of ``num_bins`` bins on
    ``b_i +- (max b - min b + 1 + S)``, a range that contains every r if no score is above
    ``S``: 1, or 32 for ``sqrtsoftplus``. The ranks sum their counts of
    tokens; quantiles are not averaged. The report's bins are uniform. Ours are uniform in
    ``asinh((r - b_i) / 1e-3)``: about 2e-5 wide near the bias, where the quantile is, and wider
    away from it. The bias is the middle of a bin, because every runner-up requires exactly the
    bias. Uniform bins of 2e-3 would be wider than the differences between the scores of a softmax
    over many experts.

    At the fixed point every expert is selected by K/E of the tokens. The rule has no speed. With
    K = E there is no choice, and the bias does not change.
    """

    type_name: ClassVar[str] = "quantile"
    filled_by_job: ClassVar[frozenset[str]] = ExpertBias.filled_by_job | {"changes"}
    """Fields that a job file cannot set; the rule has no speed that could change."""

    @dataclass(kw_only=True, slots=True)
    class Config(ExpertBias.Config):
        num_bins: int = 1000
        """Bins of each expert's histogram. Memory: 4 E num_bins bytes a layer."""

        ema: float = 0.0
        """Weight of the old bias in the new one, in [0, 1); the quantile has the rest."""

        def __post_init__(self) -> None:
            if self.num_bins < 2:
                raise JobError(
                    f"expert_bias quantile has num_bins {self.num_bins}; it must be at least 2 "
                    "(the Kimi K3 report uses 1000)"
                )
            if not 0 <= self.ema < 1:
                raise JobError(f"expert_bias quantile has ema {self.ema}; it must be in [0, 1)")

    @property
    def num_bins(self) -> int:
        """Number of histogram bins of each expert; 0 if K = E."""
        return self.config.num_bins if self.config.top_k != self.config.num_experts else 0

    def observe(self, histogram_EH, required_BLE, bias_E, number) -> None:
        """Count the required biases of a forward in the bins of the histogram."""
        num_experts, num_bins = histogram_EH.shape
        place_BLE = torch.asinh((required_BLE - bias_E) / _FINE) / self._reach(bias_E)
        bins_BLE = place_BLE.mul_((num_bins - 1) / 2).add_(num_bins // 2 + 0.5)
        bins_BLE = bins_BLE.clamp_(0, num_bins - 1)
        # NaN scores count in the middle bin, which leaves the bias unchanged.
        bins_BLE = bins_BLE.nan_to_num_(num_bins // 2).long()
        bins_BLE += torch.arange(num_experts, device=bins_BLE.device) * num_bins
        number_N = number.expand_as(bins_BLE).flatten()
        histogram_EH.view(-1).scatter_add_(0, bins_BLE.flatten(), number_N)

    def delta(self, step: BiasStep) -> torch.Tensor:
        """Compute the update from the bias to the quantile, with weight ``1 - ema``."""
        if step.histogram_NEH is None:
            return torch.zeros_like(step.bias_NE)
        return (self.quantile(step) - step.bias_NE) * (1 - self.config.ema)

    def quantile(self, step: BiasStep) -> torch.Tensor:
        """Compute the bias that would have balanced the step, less its mean, float32 ``(N, E)``."""
        assert step.histogram_NEH is not None
        assert self.config.top_k is not None
        num_experts, num_bins = step.histogram_NEH.shape[1:]
        below_NEH = step.histogram_NEH.cumsum(dim=-1, dtype=torch.int32)
        # float64: float32 would round numbers of tokens beyond 2**24.
        target_NE1 = below_NEH[..., -1:].double() * (self.config.top_k / num_experts)
        # The first bin at whose end the target is reached.
        bin_NE1 = torch.searchsorted(below_NEH, target_NE1.ceil().int())
        in_bin_NE1 = step.histogram_NEH.gather(-1, bin_NE1)
        before_NE1 = below_NEH.gather(-1, bin_NE1) - in_bin_NE1
        within_NE1 = (target_NE1 - before_NE1) / in_bin_NE1.clamp(min=1)
        place_NE = (bin_NE1 + within_NE1).squeeze(-1) - (num_bins // 2 + 0.5)
        place_NE *= 2 / (num_bins - 1)
        place_NE *= self._reach(step.bias_NE.double())
        quantile_NE = step.bias_NE + torch.sinh(place_NE) * _FINE
        quantile_NE -= quantile_NE.mean(dim=-1, keepdim=True)
        return quantile_NE.float()

    def _reach(self, bias: torch.Tensor) -> torch.Tensor:
        """Compute asinh of the largest distance of a required bias from any bias, ``(..., 1)``.

        The distance is in units of ``_FINE``.
        """
        low, high = bias.aminmax(dim=-1, keepdim=True)
        return torch.asinh((high - low + (1 + LARGEST_SCORE[self.config.score_func])) / _FINE)


_FINE = 1e-3
"""Distance from the bias at which the bins begin to widen."""
