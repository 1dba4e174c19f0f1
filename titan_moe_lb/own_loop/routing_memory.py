"""Which experts the tokens of samples had, in host memory. Numpy alone.

Shape suffixes: N = MoE layers, B = rows, L = tokens of a row, T = tokens of a sample, K = top_k.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from titan_moe_lb.errors import JobError

UNKNOWN = -1
"""In place of an expert: nobody has recorded it."""


class RoutingMemory:
    """Experts of N layers by sample.

    Attributes:
        experts: int16 ``(N, T, K)`` of each sample, -1 where unknown.
    """

    def __init__(self, num_layers: int, top_k: int) -> None:
        self._num_layers, self._top_k = num_layers, top_k
        self.experts: dict[int, np.ndarray] = {}

    def keep(
        self,
        sample: int,
        positions_T: np.ndarray,
        ids_NTK: np.ndarray,
        layers: Sequence[int] | slice = slice(None),
    ) -> None:
        """Remember the experts of some positions of a sample; -1 leaves what is known.

        Args:
            layers: indices of the layers that ``ids_NTK`` is of.
        """
        length = int(positions_T.max(initial=-1)) + 1
        known = self.experts.get(sample)
        if known is None or known.shape[1] < length:
            longer = np.full((self._num_layers, length, self._top_k), UNKNOWN, dtype=np.int16)
            if known is not None:
                longer[:, : known.shape[1]] = known
            self.experts[sample] = known = longer
        for layer, ids_TK in zip(np.arange(self._num_layers)[layers], ids_NTK, strict=True):
            given_T = ids_TK[:, 0] >= 0
            known[layer, positions_T[given_T]] = ids_TK[given_T]

    def recall(self, samples_BL: np.ndarray, positions_BL: np.ndarray) -> np.ndarray:
        """The experts of tokens.

        Args:
            samples_BL: sample of each token, -1 for none.
            positions_BL: position of each token in its sample.

        Returns:
            int64 ``(N, B, L, K)``, -1 for a token of no sample.

        Raises:
            JobError: one was never recorded.
        """
        shape = (self._num_layers, *samples_BL.shape, self._top_k)
        ids_NBLK = np.full(shape, UNKNOWN, dtype=np.int64)
        for sample in samples_in(samples_BL):
            known = self.experts.get(sample)
            if known is None:
                raise JobError(
                    f"the routing of sample {sample} was never recorded: score it under record() "
                    "first, and exchange() where another rank has"
                )
            wanted_BL = samples_BL == sample
            positions_T = positions_BL[wanted_BL]
            if positions_T.max() >= known.shape[1] or (known[:, positions_T] < 0).any():
                raise JobError(
                    f"the routing of sample {sample} was recorded for other positions than its "
                    f"{positions_T.min()} to {positions_T.max()}: score the whole sample under "
                    "record(), and exchange() where its tokens are split over ranks"
                )
            ids_NBLK[:, wanted_BL] = known[:, positions_T]
        return ids_NBLK


def samples_in(samples_BL: np.ndarray) -> list[int]:
    """The samples of some tokens."""
    return [int(sample) for sample in np.unique(samples_BL) if sample >= 0]


def positions_in_order(samples_BS: np.ndarray) -> np.ndarray:
    """The position of each token in a sample that begins where it begins in its row."""
    index_S = np.arange(samples_BS.shape[1])
    begins_BS = np.ones_like(samples_BS, dtype=bool)
    begins_BS[:, 1:] = samples_BS[:, 1:] != samples_BS[:, :-1]
    return index_S - np.maximum.accumulate(np.where(begins_BS, index_S, 0), axis=1)
