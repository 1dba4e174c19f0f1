"""Expert ids and random numbers of the forced strategies. Pure functions; torch alone.

Shape suffixes: T = tokens, E = experts, K = top_k. Nothing here asks a generator for
its state: a random number is a function of a seed and of its place, so that the
forward that activation checkpointing repeats draws the same ones.
"""

from __future__ import annotations

import torch

_MASK = 0xFFFFFFFF


def round_robin_ids(
    num_tokens: int,
    top_k: int,
    num_experts: int,
    *,
    first_token: int = 0,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Deal the experts out in turn: token t takes experts t K, ..., t K + K - 1 modulo E.

    Args:
        first_token: number of the first of the tokens.

    Returns:
        ``(T, K)`` int64, distinct in a token. Over all tokens dealt from token 0 on, no
        two experts differ by more than one token.
    """
    first = first_token * top_k
    choices = torch.arange(first, first + num_tokens * top_k, device=device)
    return (choices % num_experts).view(num_tokens, top_k)


def hot_share_ids(
    num_tokens: int,
    top_k: int,
    hot_experts: torch.Tensor,
    cold_experts: torch.Tensor,
    *,
    num_hot_choices: int,
    first_token: int,
    total_tokens: int,
) -> torch.Tensor:
    """Give a fixed number of all choices to the hot experts, evenly, the rest to the cold.

    Token t makes ``floor((t+1) H / total) - floor(t H / total)`` of its K choices among the
    hot experts; within the hot and within the cold ones the choices are dealt in turn.

    Args:
        num_tokens: T tokens are asked for.
        hot_experts, cold_experts: int64, disjoint.
        num_hot_choices: H, choices of hot experts over ``total_tokens`` tokens.
        first_token: number of the first of the T tokens in ``[0, total_tokens)``.

    Returns:
        ``(T, K)`` int64, distinct in a token.
    """
    device = hot_experts.device
    tokens_T1 = torch.arange(first_token, first_token + num_tokens, device=device).unsqueeze(1)
    choices_K = torch.arange(top_k, device=device)
    hot_before_T1 = tokens_T1 * num_hot_choices // total_tokens
    hot_T1 = (tokens_T1 + 1) * num_hot_choices // total_tokens - hot_before_T1
    cold_before_T1 = tokens_T1 * top_k - hot_before_T1
    hot_TK = hot_experts[(hot_before_T1 + choices_K) % hot_experts.numel()]
    cold_TK = cold_experts[(cold_before_T1 + choices_K - hot_T1) % cold_experts.numel()]
    return torch.where(choices_K < hot_T1, hot_TK, cold_TK)


def hash_seed(*parts: int) -> int:
    """One seed in [0, 2**32) from several integers."""
    seed = 0
    for part in parts:
        seed = int(_mix(torch.tensor((seed * 31 + part + 1) & _MASK)))
    return seed


def uniform(seed: torch.Tensor, number: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Random numbers in (0, 1), float32, a function of their place, ``seed`` and ``number``.

    Args:
        seed: int64 ``()`` in [0, 2**32).
        number: int64 ``()``; another number gives other values.
        shape: of the result.
    """
    size = 1
    for length in shape:
        size *= length
    place = torch.arange(size, device=seed.device).view(shape)
    bits = _mix(_mix((place + _mix(number ^ seed)) & _MASK) ^ seed)
    # 23 bits and a half: neither 0 nor 1 after rounding to float32.
    return ((bits >> 9).float() + 0.5) * 2.0**-23


def standard_normal(
    seed: torch.Tensor, number: torch.Tensor, shape: tuple[int, ...]
) -> torch.Tensor:
    """Standard normal numbers, float32. Args: as :func:`uniform`."""
    return torch.special.ndtri(uniform(seed, number, shape))


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A bijection of 32-bit integers that spreads every input bit over the output.

    The multiplier has 27 bits, so that no product of it overflows int64.
    """
    x = x & _MASK
    x = ((x ^ (x >> 16)) * 0x45D9F3B) & _MASK
    x = ((x ^ (x >> 16)) * 0x45D9F3B) & _MASK
    return x ^ (x >> 16)
