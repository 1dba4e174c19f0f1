"""Logarithmic codes of expert loads, one byte each, small enough to embed in a page.

Code 0 is an expert without tokens, and code 255 an absent expert. Any other code k is a load of
``2**((k - 1) / LEVELS_PER_OCTAVE + LOWEST_OCTAVE)`` times the balanced load. A code therefore
represents every load above 1/16 within 4.5%. The trace keeps the exact counts.
"""

from __future__ import annotations

import zlib

import numpy as np

from titan_moe_lb.traces.balance_statistics import relative_load

LEVELS_PER_OCTAVE = 8
LOWEST_OCTAVE = -4
_ABSENT = 255


def encode(counts: np.ndarray) -> np.ndarray:
    """Encode counts ``(..., E)`` as uint8 codes of the same shape."""
    load = relative_load(counts)
    octaves = np.log2(np.where(load > 0, load, 1.0)) - LOWEST_OCTAVE
    levels = np.clip(np.rint(octaves * LEVELS_PER_OCTAVE), 0, _ABSENT - 2) + 1
    return np.where(counts < 0, _ABSENT, np.where(load > 0, levels, 0)).astype(np.uint8)


def pack(codes_SME: np.ndarray) -> bytes:
    """Compress the codes in two forms, and return the smaller one.

    The first byte names the form. Form 1 has the differences from step to step, modulo 256, which
    are small if loads drift slowly. Form 0 has the codes themselves, Huffman-coded, for loads that
    change at random.
    """
    differences = np.diff(codes_SME, axis=0, prepend=np.zeros_like(codes_SME[:1]))
    forms = (
        _deflate(b"\1" + differences.tobytes(), zlib.Z_DEFAULT_STRATEGY),
        _deflate(b"\0" + codes_SME.tobytes(), zlib.Z_HUFFMAN_ONLY),
    )
    return min(forms, key=len)


def _deflate(content: bytes, strategy: int) -> bytes:
    compressor = zlib.compressobj(strategy=strategy)
    return compressor.compress(content) + compressor.flush()


def shown_steps(num_steps: int, most: int) -> np.ndarray:
    """Choose the indices of at most ``most`` evenly spread steps, including first and last."""
    return np.unique(np.linspace(0, num_steps - 1, min(num_steps, most)).round().astype(int))


def pack_within(
    counts_SME: np.ndarray, most_steps: int, most_bytes: int
) -> tuple[bytes, np.ndarray]:
    """Pack evenly spread steps, as many as fit.

    Args:
        counts_SME: counts of all steps.
        most_steps: largest number of steps.
        most_bytes: largest size of the result; two steps may exceed it.

    Returns:
        Packed codes of the chosen steps, and the indices of the steps.
    """
    while True:
        indices = shown_steps(len(counts_SME), most_steps)
        packed = pack(encode(counts_SME[indices]))
        if len(packed) <= most_bytes or len(indices) <= 2:
            return packed, indices
        # Steps further apart compress worse: choose 5 % fewer than the proportional number.
        most_steps = max(2, int(0.95 * len(indices) * most_bytes / len(packed)))
