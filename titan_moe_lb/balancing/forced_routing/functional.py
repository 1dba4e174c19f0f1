"""Expert ids and random numbers of the forced strategies. Pure functions; torch alone.

Shape suffixes: T = tokens, E = experts, K = top_k. Nothing here asks a generator for
its state: a random number is a function of a seed and of its place, so that the
forward that activation checkpointing repeats draws the same ones.
"""

from __future__ import annotations

import math
from typing import Literal

import torch


def round_robin_ids(tokens_T: torch.Tensor, top_k: int, num_experts: int) -> torch.Tensor:
    """Deal the experts out in turn: token t takes experts t K, ..., t K + K - 1 modulo E.

    Args:
        tokens_T: numbers of the tokens, int64 ``(T,)``.

    Returns:
        ``(T, K)`` int64, distinct in a token. Over successive tokens no two experts differ
        by more than one token.
    """
    choices_K = torch.arange(top_k, device=tokens_T.device)
    return (tokens_T.unsqueeze(1) * top_k + choices_K) % num_experts


def hot_share_ids(
    tokens_T: torch.Tensor,
    top_k: int,
    hot_experts: torch.Tensor,
    cold_experts: torch.Tensor,
    *,
    num_hot_choices: int,
    total_tokens: int,
) -> torch.Tensor:
    """Give a fixed number of all choices to the hot experts, evenly, the rest to the cold.

    Token t makes ``floor((t+1) H / total) - floor(t H / total)`` of its K choices among the
    hot experts; within the hot and within the cold ones the choices are dealt in turn.

    Args:
        tokens_T: numbers of the tokens in ``[0, total_tokens)``, int64 ``(T,)``.
        hot_experts, cold_experts: int64, disjoint.
        num_hot_choices: H, choices of hot experts over ``total_tokens`` tokens.

    Returns:
        ``(T, K)`` int64, distinct in a token.
    """
    tokens_T1 = tokens_T.unsqueeze(1)
    choices_K = torch.arange(top_k, device=tokens_T.device)
    hot_before_T1 = tokens_T1 * num_hot_choices // total_tokens
    hot_T1 = (tokens_T1 + 1) * num_hot_choices // total_tokens - hot_before_T1
    cold_before_T1 = tokens_T1 * top_k - hot_before_T1
    hot_TK = hot_experts[(hot_before_T1 + choices_K) % hot_experts.numel()]
    cold_TK = cold_experts[(cold_before_T1 + choices_K - hot_T1) % cold_experts.numel()]
    return torch.where(choices_K < hot_T1, hot_TK, cold_TK)


def ragged_rows(
    tokens_T: torch.Tensor,
    top_k: int,
    num_experts: int,
    *,
    fraction: float,
    distance: float,
    dispatched_tokens: int,
) -> torch.Tensor:
    """Exchange tokens among those that are dispatched together, sorted by their experts.

    Of the n tokens of a dispatch ``R = round(fraction n)``, spread evenly, are ragged: the
    i-th of them takes, of the R first rows that :func:`round_robin_ids` deals, the i-th in
    the order of their first expert, beginning ``distance E`` experts up the ring. The others
    take the other rows as they come. Of R, what is no whole number of rounds (the rows after
    which the deal repeats) comes last and unsorted.

    Args:
        tokens_T: numbers of the tokens, int64 ``(T,)``.
        dispatched_tokens: n.

    Returns:
        The number of the row that each token takes, int64 ``(T,)``: a permutation of the
        tokens of a dispatch, so that no count of an expert differs from round robin's.
    """
    first_T = tokens_T // dispatched_tokens * dispatched_tokens
    place_T = tokens_T - first_T
    num_ragged = round(fraction * dispatched_tokens)
    ragged_before_T = place_T * num_ragged // dispatched_tokens
    is_ragged_T = (place_T + 1) * num_ragged // dispatched_tokens > ragged_before_T
    # Row t begins with expert t K mod E, a multiple of step: in a round once with each.
    step = math.gcd(top_k, num_experts)
    per_round = num_experts // step
    rounds = num_ragged // per_round
    nth_T = ragged_before_T // max(rounds, 1) + round(distance * per_round)
    inverse = pow(top_k // step, -1, per_round)
    in_round_T = (nth_T * inverse - first_T) % per_round
    sorted_T = ragged_before_T % max(rounds, 1) * per_round + in_round_T
    ragged_T = torch.where(ragged_before_T < rounds * per_round, sorted_T, ragged_before_T)
    return first_T + torch.where(is_ragged_T, ragged_T, num_ragged + place_T - ragged_before_T)


def even_order(
    num_experts: int, top_k: int, expert_parallel: int, open_groups: int | None = None
) -> list[int]:
    """All experts, in an order of which any n successive ones lie evenly on the EP ranks.

    A digit reversal (van der Corput's sequence): the digits of a place, lowest first, are
    those of the expert, highest first. The radices are the prime factors of the EP degree,
    then those of E / EP, so that the order is the same for all EP degrees that are powers of
    two. Torchtitan gives rank r the experts ``[r E/EP, (r+1) E/EP)``.

    Args:
        open_groups: expert groups that a token may reach; None for all. Its K experts then
            are that many runs of successive ones. Where no such runs divide both K and E,
            the order is 0, 1, ..., E - 1.

    Returns:
        A permutation of the experts. Without ``open_groups`` the numbers of any n successive
        ones on two ranks differ by at most one, the order being read as a ring.
    """
    most = top_k if open_groups is None else open_groups
    lengths = [length for length in range(1, top_k + 1) if top_k % length == 0]
    fitting = [n for n in lengths if num_experts % n == 0 and top_k // n <= most]
    length = fitting[0] if fitting else num_experts
    runs = num_experts // length
    of_ranks = math.gcd(runs, expert_parallel)
    order, stride = [0], runs
    for radix in (*_prime_factors(of_ranks), *_prime_factors(runs // of_ranks)):
        stride //= radix
        order = [run + digit * stride for digit in range(radix) for run in order]
    return [run * length + i for run in order for i in range(length)]


def placed_experts(
    number: int, num_experts: int, placement: Literal["contiguous", "spread"]
) -> list[int]:
    """``number`` experts: the first ones, or at equal distances over all, ``floor(i E / number)``.

    Spread ones lie evenly on the ranks of every EP degree, to within one.
    """
    if placement == "contiguous":
        return list(range(number))
    return [i * num_experts // number for i in range(number)]


def _prime_factors(number: int) -> list[int]:
    """Ascending, as often as each divides."""
    factors, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return factors


def hash_seed(*parts: int) -> int:
    """One 64-bit seed from several integers, as int64.

    Two of n seeds are equal with a chance of about n^2 / 2^65: 2e-9 for the 250,000 seeds of
    61 layers on 4,096 ranks.
    """
    seed = torch.zeros((), dtype=torch.int64)
    for part in parts:
        seed = _mix(seed + _signed(part))
    return int(seed)


def uniform(seed: torch.Tensor, number: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Random numbers in (0, 1), float32, a function of their place, ``seed`` and ``number``.

    The stream of one seed and number is no stretch of that of another, as it would be if
    they only chose where in one long sequence it begins.

    Args:
        seed: int64 ``()``, of :func:`hash_seed`.
        number: int64 ``()``; another number gives other values.
        shape: of the result.
    """
    place = torch.arange(math.prod(shape), device=seed.device).view(shape)
    bits = _mix(_mix(place + seed) ^ _mix(_mix(number) ^ seed))
    # 23 bits and a half: neither 0 nor 1 after rounding to float32.
    return (_shifted(bits, 41).float() + 0.5) * 2.0**-23


def standard_normal(
    seed: torch.Tensor, number: torch.Tensor, shape: tuple[int, ...]
) -> torch.Tensor:
    """Standard normal numbers, float32. Args: as :func:`uniform`."""
    return torch.special.ndtri(uniform(seed, number, shape))


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A bijection of 64-bit integers that spreads every input bit over the output.

    One step of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) from state x: products and
    sums of int64 wrap around, as those of unsigned integers do.
    """
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """To the right, with zeros from the left: int64 alone would repeat the sign."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _signed(x: int) -> int:
    """The int64 of the same last 64 bits."""
    return (x + 2**63) % 2**64 - 2**63
