"""Expert ids and random numbers of the forced strategies. Pure functions; torch alone.

Shape suffixes: T = tokens, E = experts, K = top_k. Nothing here asks a generator for
its state: a random number is a function of a seed and of its place, so that the
forward that activation checkpointing repeats draws the same ones.
"""

from __future__ import annotations

import math

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
