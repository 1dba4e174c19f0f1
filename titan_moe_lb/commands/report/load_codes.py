"""Loads of all experts in one byte each, small enough to embed in a page.

A code is a logarithm: 0 is an expert without tokens, 255 one that the layer does not have, and
code k between them a load of 2**((k - 1) / LEVELS_PER_OCTAVE + LOWEST_OCTAVE) times the balanced
load. So every load above 1/16 is within 4.5% of its code. Exact counts stay in the trace.
"""

from __future__ import annotations

import zlib

import numpy as np

from titan_moe_lb.traces.balance_statistics import relative_load

LEVELS_PER_OCTAVE = 8
LOWEST_OCTAVE = -4
_ABSENT = 255


def encode(counts: np.ndarray) -> np.ndarray:
    """Counts ``(..., E)`` to codes of the same shape, uint8."""
    load = relative_load(counts)
    octaves = np.log2(np.where(load > 0, load, 1.0)) - LOWEST_OCTAVE
    levels = np.clip(np.rint(octaves * LEVELS_PER_OCTAVE), 0, _ABSENT - 2) + 1
    return np.where(counts < 0, _ABSENT, np.where(load > 0, levels, 0)).astype(np.uint8)


def pack(codes_SME: np.ndarray) -> bytes:
    """Deflate the codes in the smaller of two forms, which the first byte names.

    1: differences from step to step, modulo 256, small where loads drift slowly. 0: the codes
    themselves, each by how often it occurs, for loads that change at random.
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
    """Indices of at most ``most`` steps, evenly spread, with the first and the last."""
    return np.unique(np.linspace(0, num_steps - 1, min(num_steps, most)).round().astype(int))


def pack_within(
    counts_SME: np.ndarray, most_steps: int, most_bytes: int
) -> tuple[bytes, np.ndarray]:
    """Pack as many steps as fit.

    Returns:
        What :func:`pack` makes of them, and their indices.
    """
    while True:
        indices = shown_steps(len(counts_SME), most_steps)
        packed = pack(encode(counts_SME[indices]))
        if len(packed) <= most_bytes or len(indices) <= 2:
            return packed, indices
        # Steps further apart differ more: go a little below the proportional number.
        most_steps = max(2, int(0.95 * len(indices) * most_bytes / len(packed)))
