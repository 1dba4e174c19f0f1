"""Tokens that the experts of the busiest device compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from titan_moe_lb.errors import JobError

Array = Any
"""A number or a numpy array, as the arguments are."""

WORST = -1.0
"""The imbalance factor that stands for the worst case, E/K."""

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
    """Hot experts among them."""
    receiver_skew: Array
    """See :func:`receiver_skew`."""

    @property
    def tokens_on_device(self) -> Array:
        """Tokens that the busiest device receives."""
        others = self.experts_on_device - self.hot_experts_on_device
        return self.hot_experts_on_device * self.hot_tokens + others * self.remaining_tokens

    def gemms(self) -> tuple[Array, Array, Array, Array]:
        """The GEMMs of the busiest device, in whole tokens.

        Returns:
            hot GEMMs, rows of each, other GEMMs, rows of each. Fewer routed tokens than
            experts leave some experts without work: then as many experts as there are
            tokens compute one row each.
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
    """The load of the experts of one layer, and of those on the busiest device.

    A token selects K different experts, so that no expert gets more than T tokens: the
    imbalance factor, the load of a hot expert over the mean, is at most E/K.

    Args:
        num_experts: E.
        top_k: K, experts that each token selects.
        num_tokens: T, tokens dispatched together: those of all ranks of the EP group.
        imbalance_factor: x in [1, E/K]; -1 for E/K.
        num_hot_experts: W in [1, K], all of them on one device where it has room.
        ep_degree: devices over which the experts are split in contiguous blocks.

    Raises:
        JobError: E, K or EP below 1 or not whole, K above E, no tokens, the imbalance factor
            outside [1, E/K], W outside [1, K] or not whole.
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
        # Written so that not-a-number is outside too.
        ~((factor >= 1 - TOLERANCE) & (factor <= worst * (1 + TOLERANCE))),
        "imbalance_factor {:g} is outside [1, {:g}] (1 is balance, E/K the worst case; -1 stands for "
        "the worst case)",
        given,
        worst,
    )
    factor = np.clip(factor, 1.0, worst)
    # Loads in units of the mean load of an expert. Where all experts are hot, K is E, and
    # balance is the only possibility.
    others = experts - hot
    rest = np.maximum((experts - hot * factor) / np.maximum(others, 1.0), 0.0)
    rest = np.where(others > 0, rest, factor)
    # Where EP does not divide E, some device holds one expert more.
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
    """Tokens that the busiest device of an all-to-all receives over the mean T K / EP.

    It does not depend on the number of tokens. Where EP does not divide E, the busiest
    device has more experts than the mean; that is no imbalance of the routing, so the skew
    is at most the imbalance factor: 1 at balance, never above E/K.

    Args: scalars, or arrays that broadcast; see :func:`expert_load`.

    Returns:
        A float, or an array of the broadcast shape, in [1, E/K]; 1 without EP.

    Raises:
        JobError: an argument outside its range.

    Source: NeuSim's receiver skew of MoE dispatch; the upper bound is ours.
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
    """The probability that an expert has any work, ``1 - (1 - p)^T``.

    Args:
        chosen: p, the probability that a token chooses it: K/E at balance.
        num_tokens: T, tokens that choose independently.
    """
    with np.errstate(divide="ignore"):  # of an expert that every token chooses
        return -np.expm1(np.asarray(num_tokens) * np.log1p(-np.minimum(chosen, 1.0)))


def whole_rows(tokens: Array) -> Array:
    """Tokens rounded up, but not 8.000000000001 to 9."""
    return np.ceil(tokens - TOLERANCE * np.maximum(1.0, tokens))


def _whole(name: str, value: ArrayLike) -> Array:
    array = np.asarray(value, dtype=np.float64)
    wrong = ~((array >= 1) & (array == np.floor(array)))
    _refuse(wrong, name + " {:g} must be a whole number of at least 1", array)
    return array


def _refuse(wrong: Array, message: str, *values: Array) -> None:
    """Raise ``JobError`` with the first values that are wrong, if any are."""
    if wrong.any():
        first = [float(np.broadcast_to(value, wrong.shape)[wrong].flat[0]) for value in values]
        raise JobError(message.format(*first))
