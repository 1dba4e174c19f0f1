"""Expert ids and random numbers of the forced strategies. Pure functions; torch alone.

Shape suffixes: T = tokens, E = experts, K = top_k. No function uses the state of a generator: a
random number is a function of a seed and of its index. A forward that activation checkpointing
recomputes therefore draws the same numbers.
"""

from __future__ import annotations

import math
from typing import Literal

import torch


def round_robin_ids(tokens_T: torch.Tensor, top_k: int, num_experts: int) -> torch.Tensor:
    """Assign the experts in turn: token t selects experts t K, ..., t K + K - 1 modulo E.

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
    """Assign a fixed number of choices evenly to the hot experts, and the rest to the cold ones.

    Token t makes ``floor((t+1) H / total) - floor(t H / total)`` of its K choices among the
    hot experts. Within the hot and within the cold experts, choices are assigned in turn.

    H is ``num_hot_choices``, the choices of hot experts over all ``total_tokens`` tokens of the
    global batch. Hot and cold experts are disjoint, int64.

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
    """Reorder the round-robin rows of each dispatch, a fraction of them by their first expert.

    Row t contains the experts that :func:`round_robin_ids` assigns to token t. Of the n tokens of
    a dispatch, ``R = round(fraction n)`` evenly spread tokens are ragged, and they use the first R
    rows. The i-th ragged token uses the i-th of these rows in the order of their first expert,
    which begins at expert ``distance E`` and wraps around. The other tokens use the other rows in
    order. A round is the number of rows after which round robin repeats. Rows of R beyond its
    last whole round come last and unsorted.

    ``fraction`` is in (0, 1], ``distance`` in [0, 1), and n is ``dispatched_tokens``.

    Returns:
        Row of each token, int64 ``(T,)``: a permutation of the tokens of a dispatch. Each expert
        therefore has as many tokens as with round robin.
    """
    first_T = tokens_T // dispatched_tokens * dispatched_tokens
    place_T = tokens_T - first_T
    num_ragged = round(fraction * dispatched_tokens)
    ragged_before_T = place_T * num_ragged // dispatched_tokens
    is_ragged_T = (place_T + 1) * num_ragged // dispatched_tokens > ragged_before_T
    # Row t begins with expert t K mod E, a multiple of step; a round has each multiple once.
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
    """Order all experts so that any n successive ones spread evenly over the EP ranks.

    The order is a digit reversal (van der Corput's sequence). The digits of a position, lowest
    first, are the digits of its expert, highest first. The radices are the prime factors of the EP
    degree, then those of E / EP, so all EP degrees that are powers of two have the same order.
    torchtitan assigns the experts ``[r E/EP, (r+1) E/EP)`` to rank r.

    With ``open_groups``, the expert groups that a token may reach, its K experts form at most so
    many runs of successive experts. If no length of such runs divides both K and E, the order is 0,
    1, ..., E - 1.

    Returns:
        A permutation of the experts, to be read as a ring. Without ``open_groups``, the numbers of
        any n successive experts on two ranks differ by at most one.
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
    """Select ``number`` experts: the first ones, or ``floor(i E / number)`` for i from 0.

    Spread experts are even on the ranks of every EP degree, to within one.
    """
    if placement == "contiguous":
        return list(range(number))
    return [i * num_experts // number for i in range(number)]


def _prime_factors(number: int) -> list[int]:
    """Return the prime factors of a number, ascending, with repetitions."""
    factors, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return factors


def hash_seed(*parts: int) -> int:
    """Hash several integers to one 64-bit seed, as int64.

    Two of n seeds are equal with a probability of about n^2 / 2^65: 2e-9 for the 250,000 seeds of
    61 layers on 4,096 ranks.
    """
    seed = torch.zeros((), dtype=torch.int64)
    for part in parts:
        seed = _mix(seed + _signed(part))
    return int(seed)


def uniform(seed: torch.Tensor, number: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Draw random numbers in (0, 1), float32, from their index, ``seed`` and ``number``.

    The streams of two pairs of seed and number are not shifted parts of one long sequence.

    ``seed`` is of :func:`hash_seed`; both are int64 ``()``.
    """
    place = torch.arange(math.prod(shape), device=seed.device).view(shape)
    bits = _mix(_mix(place + seed) ^ _mix(_mix(number) ^ seed))
    # 23 bits and a half: neither 0 nor 1 after rounding to float32.
    return (_shifted(bits, 41).float() + 0.5) * 2.0**-23


def standard_normal(
    seed: torch.Tensor, number: torch.Tensor, shape: tuple[int, ...]
) -> torch.Tensor:
    """Draw standard normal numbers, float32; the arguments are those of :func:`uniform`."""
    return torch.special.ndtri(uniform(seed, number, shape))


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Apply a bijection of 64-bit integers that spreads every input bit over the output.

    This is one step of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) from state x. Products and
    sums of int64 wrap around like those of unsigned integers.
    """
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift to the right and fill with zeros; an int64 shift alone would repeat the sign."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _signed(x: int) -> int:
    """Return the int64 with the same last 64 bits."""
    return (x + 2**63) % 2**64 - 2**63
