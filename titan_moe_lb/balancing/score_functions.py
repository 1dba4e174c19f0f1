"""Score functions: scores of the experts from the logits of a gate. Torch alone.

Shape suffixes: B = rows, L = tokens of a row, E = experts.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F

from titan_moe_lb.functional import at_least_float32

ScoreFunction = Literal["softmax", "sigmoid", "sqrtsoftplus"]
"""Value of ``score_func``."""

_EXACT = 40.0
"""Logit from which on softplus(x) = x, and below whose negative softplus(x) = exp(x), in the
precision of float64."""


class _SqrtSoftplus(torch.autograd.Function):
    """Score and slope that neither underflow nor divide by 0 where softplus does."""

    @staticmethod
    def forward(logits_BLE: torch.Tensor) -> torch.Tensor:
        usual_BLE = F.softplus(logits_BLE, threshold=_EXACT).sqrt()
        return torch.where(logits_BLE < -_EXACT, (logits_BLE / 2).exp(), usual_BLE)

    @staticmethod
    def setup_context(ctx, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, grad_BLE: torch.Tensor) -> torch.Tensor:
        # sigmoid(x) / (2 s), in which sigmoid(x) = 1 - exp(-softplus(x)) = 1 - exp(-s^2).
        scores_BLE = at_least_float32(*ctx.saved_tensors)
        return (grad_BLE * _slope_of_sqrt_softplus(scores_BLE)).to(grad_BLE.dtype)


def _slope_of_sqrt_softplus(scores_BLE: torch.Tensor) -> torch.Tensor:
    usual_BLE = -torch.expm1(-scores_BLE.square()) / scores_BLE
    return torch.where(scores_BLE < math.exp(-_EXACT / 2), scores_BLE, usual_BLE) / 2


def sqrt_softplus(logits_BLE: torch.Tensor) -> torch.Tensor:
    """Compute sqrt(log(1 + exp(x))): the scores of DeepSeek-V4, arXiv 2606.19348.

    Scores and gradients are finite for all finite logits. In float32 they are exact down to logits
    of -170; softplus alone is 0 below -104, where its square root has no gradient.

    Returns:
        Scores above 0, in the shape and dtype of the logits.
    """
    return _SqrtSoftplus.apply(logits_BLE)


SCORE_FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": functools.partial(F.softmax, dim=-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": sqrt_softplus,
}
"""Score functions of logits ``(..., E)``, by the value of ``score_func``."""

SLOPES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "softmax": lambda scores, logits: scores,
    "sigmoid": lambda scores, logits: torch.addcmul(scores, scores, scores, value=-1),
    "sqrtsoftplus": lambda scores, logits: logits.sigmoid() / scores / 2,
}
"""Change of a score with its logit, as a function of both. For a softmax it is the change
relative to the other experts: that of two scores that are close to each other is s per logit."""

LARGEST_SCORE = {"softmax": 1.0, "sigmoid": 1.0, "sqrtsoftplus": 32.0}
"""Largest score that a histogram of scores distinguishes; that of a logit of 1,024 if there is no
largest one."""
