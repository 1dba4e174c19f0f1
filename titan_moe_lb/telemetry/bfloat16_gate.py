"""Share of tokens that a gate in bfloat16 would route to other experts.

Such a gate multiplies its input and its weight in bfloat16, sums in float32 and rounds the logits to
bfloat16; scores, bias and choice are in float32 (sglang pull request 33764 measures 5.3 % on a layer
of Kimi-K3). Operands that are in bfloat16 already are not rounded again. The estimate assumes that
only the last chosen and the next expert can change places, or the last open and the next group.

Shape suffixes: J = quantiles of the next expert's logit, Z = relative margins, X = nodes of the
quadrature.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

BITS = 8
"""Bits of a bfloat16's significand."""
_ROUNDING = 2.0**-BITS / math.sqrt(3) * math.sqrt(0.375 / math.log(2))
"""Root mean square of the relative error of rounding to bfloat16, over uniform log2 of the number."""
_POINTS = 32
"""Relative margins between two edges at which the probability is computed."""
_QUANTILES_J = np.array([NormalDist().inv_cdf((index + 0.5) / 33) for index in range(33)])
_NODES_X, _WEIGHTS_X = np.polynomial.hermite_e.hermegauss(21)


def flip_share(
    shares_below: Sequence[float],
    edges: Sequence[float],
    *,
    next_logit: tuple[float, float],
    logit_rms: float,
    rounded: float,
    biased: bool,
) -> float:
    """Estimate the share of tokens whose experts would differ.

    Args:
        shares_below: share of the tokens whose relative margin is below each edge.
        edges: edges of the relative margin, ascending. Between them it is taken as uniform.
        next_logit: mean and standard deviation of the logit of the first expert not chosen.
        logit_rms: root mean square of the logits, mean over the tokens.
        rounded: operands of the gate, input and weight, that are not in bfloat16 yet, 0 to 2.
        biased: True if the experts have different biases. Without them a rounded logit keeps its
            place unless it ties with another, and half of the ties change places.
    """
    if not logit_rms > 0:
        return math.nan
    mean, deviation = next_logit
    logits_J = np.abs(mean + deviation * _QUANTILES_J)
    exponents_J = np.floor(np.log2(np.maximum(logits_J, np.finfo(np.float32).tiny)))
    spacing_J = 2.0 ** (exponents_J + 1 - BITS) / logit_rms
    noise = math.sqrt(2 * rounded) * _ROUNDING
    total, low, below = 0.0, 0.0, 0.0
    for edge, share in zip(edges, shares_below, strict=True):
        margins_Z = low + (edge - low) * (np.arange(_POINTS) + 0.5) / _POINTS
        total += (share - below) * _flip_probability(margins_Z, spacing_J, noise, biased).mean()
        low, below = edge, share
    return float(total)


def _flip_probability(
    margins_Z: np.ndarray, spacing_J: np.ndarray, noise: float, biased: bool
) -> np.ndarray:
    """Compute the probability that two experts change places, ``(J, Z)``.

    ``spacing_J`` is the distance of neighboring bfloat16 numbers at the logits. ``noise`` is the
    standard deviation of the error of their difference before they are rounded.
    """
    difference_ZX = margins_Z[:, None] + noise * _NODES_X
    ratio_JZX = difference_ZX / spacing_J[:, None, None]
    tail_JZX = np.clip(1 - np.abs(ratio_JZX), 0, 1) ** (2 if biased else 1) / 2
    flips_JZX = np.where(ratio_JZX > 0, tail_JZX, 1 - tail_JZX)
    return flips_JZX @ (_WEIGHTS_X / _WEIGHTS_X.sum())
