"""Checks of the arrays that a loop passes to :class:`titan_moe_lb.RoutingReplay`.

Shape suffixes: B = rows, S = tokens of a whole row, T = tokens of a sample, K = top_k.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from titan_moe_lb.errors import JobError
from titan_moe_lb.own_loop.routing_memory import UNKNOWN, positions_in_order

SAMPLE_IDS = "sample_ids"
"""Argument of the model's forward: sample of each token of whole rows, int64 ``(B, S)``; -1 for no
sample."""

SAMPLE_POSITIONS = "sample_positions"
"""Argument of the model's forward: position of each token in its sample, int64 ``(B, S)``. Default:
a sample begins at its first token in the row."""


def expert_ids(given: Any, top_k: int, num_experts: int) -> np.ndarray:
    """Check the experts of the tokens of a sample, and return them as an array ``(T, K)``."""
    try:
        ids_TK = np.asarray(given.cpu() if torch.is_tensor(given) else given)
    except ValueError:  # rows of different length
        ids_TK = np.empty(len(given), dtype=object)
    if ids_TK.dtype.kind not in "iu" or ids_TK.ndim != 2 or ids_TK.shape[1] != top_k:
        raise JobError(
            f"add(expert_ids_TK) is {ids_TK.dtype} of shape {ids_TK.shape}; the layer needs "
            f"integers of shape (tokens of the sample, {top_k})"
        )
    sorted_TK = np.sort(ids_TK, axis=1)
    chosen_T = (sorted_TK[:, 0] >= 0) & (sorted_TK[:, -1] < num_experts)
    chosen_T &= (sorted_TK[:, 1:] != sorted_TK[:, :-1]).all(axis=1)
    wrong_T = ~(chosen_T | (ids_TK == UNKNOWN).all(axis=1))
    if wrong_T.any():
        token = int(wrong_T.argmax())
        raise JobError(
            f"add(expert_ids_TK) has {ids_TK[token].tolist()} for token {token}; give {top_k} "
            f"different experts of 0 to {num_experts - 1}, or a row of -1 where the token has to "
            "choose itself"
        )
    return ids_TK


def samples_and_positions(
    samples: torch.Tensor, positions: torch.Tensor | None, *, rows: int, length: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Check the samples and positions of tokens, and return them as arrays ``(B, S)``.

    ``length`` is None if only the model's first stage knows it. Without positions, samples begin
    where they begin in their rows.
    """
    samples_BS = _whole_rows(SAMPLE_IDS, samples, rows, length)
    if positions is None:
        return samples_BS, positions_in_order(samples_BS)
    positions_BS = _whole_rows(SAMPLE_POSITIONS, positions, rows, samples_BS.shape[1])
    if (positions_BS[samples_BS >= 0] < 0).any():
        raise JobError(f"{SAMPLE_POSITIONS} has a negative position for a token of a sample")
    return samples_BS, positions_BS


def _whole_rows(name: str, given: torch.Tensor, rows: int, length: int | None) -> np.ndarray:
    if not torch.is_tensor(given):
        raise JobError(f"{name} is a {type(given).__name__}; give an int64 tensor of whole rows")
    found = tuple(given.shape)
    integers = not (given.dtype.is_floating_point or given.dtype == torch.bool)
    if not (integers and len(found) == 2 and found[0] == rows and length in (None, found[1])):
        raise JobError(
            f"{name} is {str(given.dtype).removeprefix('torch.')} of shape {found}; this batch "
            f"needs integers of shape ({rows}, {length or 'S'}), whole rows also where a rank "
            "holds a part of each"
        )
    return given.cpu().numpy()
