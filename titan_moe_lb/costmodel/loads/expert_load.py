"""Two-level expert load, and the tokens of the busiest device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from titan_moe_lb.errors import JobError

Array = Any
"""A float for scalar arguments, else a numpy array of their broadcast shape."""

WORST = -1.0
"""Imbalance factor that selects the worst case, E/K."""

TOLERANCE = 1e-9


@dataclass(frozen=True, slots=True)
class ExpertLoad:
    """Tokens per expert when W experts are hot and the others share the rest evenly.

    Every field is a float or an array of the broadcast shape of the arguments.
    """

    hot_tokens: Array
    """Tokens of each hot expert."""
    remaining_tokens: Array
    """Tokens of each other expert."""
    experts_on_device: Array
    """Experts on the busiest device: E / EP rounded up, at least 1."""
    hot_experts_on_device: Array
    """Hot experts on the busiest device."""
    receiver_skew: Array
    """Tokens of the busiest receiver over the mean; see :func:`receiver_skew`."""

    @property
    def tokens_on_device(self) -> Array:
        """Tokens that the busiest device receives."""
        others = self.experts_on_device - self.hot_experts_on_device
        return self.hot_experts_on_device * self.hot_tokens + others * self.remaining_tokens

    def gemms(self) -> tuple[Array, Array, Array, Array]:
        """Count the GEMMs of the busiest device and their rows, in whole tokens.

        Returns:
            hot GEMMs, rows of each, other GEMMs, rows of each. If an other expert has less than
            one token on average, some experts have no work. Then each token of the other experts
            is a GEMM of one row.
        """
        others = self.experts_on_device - self.hot_experts_on_device
        rows = whole_rows(self.remaining_tokens)
        sparse = self.remaining_tokens < 1 - TOLERANCE
        return (
            self.hot_experts_on_device,
            np.maximum(1.0, whole_rows(self.hot_tokens)),
            np.where(sparse, whole_rows(others * self.remaining_tokens), others)[()],
            np.where(sparse, 1.0, rows)[()],
        )


def expert_load(
    *,
    num_experts: ArrayLike,
    top_k: ArrayLike,
    num_tokens: ArrayLike,
    imbalance_factor: ArrayLike = WORST,
    num_hot_experts: ArrayLike = 1,
    ep_degree: ArrayLike = 1,
) -> ExpertLoad:
    """Compute the two-level load of one layer's experts and of the busiest device.

    A token selects K different experts, so no expert gets more than T tokens. The imbalance
    factor, the load of a hot expert over the mean, is therefore at most E/K.

    Args:
        num_experts: E.
        top_k: K, experts that each token selects.
        num_tokens: T, tokens that all ranks of the EP group dispatch together.
        imbalance_factor: x in [1, E/K]; -1 for E/K.
        num_hot_experts: W in [1, K]. One device holds as many of them as it has experts.
        ep_degree: devices over which the experts are split in contiguous blocks.

    Raises:
        JobError: E, K, W or EP is below 1 or not whole, K is above E, there are no tokens, the
            imbalance factor is outside [1, E/K], or W is above K.
    """
    experts = _whole("num_experts", num_experts)
    k = _whole("top_k", top_k)
    degree = _whole("ep_degree", ep_degree)
    hot = _whole("num_hot_experts", num_hot_experts)
    tokens = np.asarray(num_tokens, dtype=np.float64)
    _refuse(k > experts, "top_k {:g} exceeds the {:g} experts", k, experts)
    _refuse(
        hot > k,
        "num_hot_experts {:g} is outside [1, {:g}]: more than top_k experts cannot all be the most "
        "loaded one",
        hot,
        k,
    )
    _refuse(tokens <= 0, "num_tokens {} must be above 0", tokens)
    worst = experts / k
    given = np.asarray(imbalance_factor, dtype=np.float64)
    factor = np.where(given == WORST, worst, given)
    _refuse(
        # The negated form refuses NaN as well.
        ~((factor >= 1 - TOLERANCE) & (factor <= worst * (1 + TOLERANCE))),
        "imbalance_factor {:g} is outside [1, {:g}] (1 is balance, E/K the worst case; -1 stands for "
        "the worst case)",
        given,
        worst,
    )
    factor = np.clip(factor, 1.0, worst)
    # Loads are in units of an expert's mean load. If all experts are hot, K is E, and balance
    # is the only possible load.
    others = experts - hot
    rest = np.maximum((experts - hot * factor) / np.maximum(others, 1.0), 0.0)
    rest = np.where(others > 0, rest, factor)
    # If EP does not divide E, some devices hold one expert more than others.
    on_device = np.maximum(1.0, np.ceil(experts / degree))
    hot_on_device = np.minimum(hot, on_device)
    busiest = hot_on_device * factor + (on_device - hot_on_device) * rest
    skew = np.clip(busiest * degree / experts, 1.0, factor)
    mean = tokens / worst
    return ExpertLoad(
        hot_tokens=(mean * factor)[()],
        remaining_tokens=(mean * rest)[()],
        experts_on_device=on_device[()],
        hot_experts_on_device=hot_on_device[()],
        receiver_skew=np.where(degree > 1, skew, 1.0)[()],
    )


def receiver_skew(
    *,
    num_experts: ArrayLike,
    top_k: ArrayLike,
    ep_degree: ArrayLike,
    imbalance_factor: ArrayLike = WORST,
    num_hot_experts: ArrayLike = 1,
) -> Array:
    """Tokens that the busiest device of an all-to-all receives, over the mean T K / EP.

    The ratio does not depend on the number of tokens. If EP does not divide E, the busiest
    device holds more experts than the mean. The routing does not cause that excess, so the skew
    is clipped to the imbalance factor: 1 at balance, at most E/K.

    Args:
        num_experts: E, a number or an array that broadcasts with the others.
        top_k: K, experts that each token selects.
        ep_degree: devices over which the experts are split in contiguous blocks.
        imbalance_factor: load of a hot expert over the mean, in [1, E/K]; -1 for E/K.
        num_hot_experts: W in [1, K].

    Returns:
        A float, or an array of the broadcast shape, in [1, E/K]; 1 without EP.

    Raises:
        JobError: an argument is outside its range; see :func:`expert_load`.

    Source: NeuSim's receiver skew of MoE dispatch (github.com/platformxlab/NeuSim). The upper
    bound is ours.
    """
    return expert_load(
        num_experts=num_experts,
        top_k=top_k,
        num_tokens=1,
        imbalance_factor=imbalance_factor,
        num_hot_experts=num_hot_experts,
        ep_degree=ep_degree,
    ).receiver_skew


def active_share(chosen: ArrayLike, num_tokens: ArrayLike) -> Array:
    """Probability that an expert has any work, ``1 - (1 - p)^T``.

    Args:
        chosen: p, the probability that a token chooses the expert: K/E at balance.
        num_tokens: T, tokens that choose independently.
    """
    with np.errstate(divide="ignore"):  # log(0) for an expert that every token chooses
        return -np.expm1(np.asarray(num_tokens) * np.log1p(-np.minimum(chosen, 1.0)))


def whole_rows(tokens: Array) -> Array:
    """Round tokens up, with a tolerance: 8.000000000001 becomes 8, not 9."""
    return np.ceil(tokens - TOLERANCE * np.maximum(1.0, tokens))


def _whole(name: str, value: ArrayLike) -> Array:
    array = np.asarray(value, dtype=np.float64)
    wrong = ~((array >= 1) & (array == np.floor(array)))
    _refuse(wrong, name + " {:g} must be a whole number of at least 1", array)
    return array


def _refuse(wrong: Array, message: str, *values: Array) -> None:
    """Raise ``JobError`` with the first wrong values, if any value is wrong."""
    if wrong.any():
        first = [float(np.broadcast_to(value, wrong.shape)[wrong].flat[0]) for value in values]
        raise JobError(message.format(*first))
