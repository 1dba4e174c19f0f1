"""Experts of the tokens of samples, in host memory. Needs numpy alone.

Shape suffixes: N = MoE layers, B = rows, L = tokens of a row, T = tokens of a sample, K = top_k.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from titan_moe_lb.errors import JobError

UNKNOWN = -1
"""Placeholder for an expert that was not recorded."""

OWN_CHOICE = -2
"""Placeholder for an expert of a token that was added without experts and chooses itself."""


class Recording(NamedTuple):
    """Version of a sample's experts. The largest recording is the newest, also across ranks.

    Ranks that record one sample in the same optimizer step have no common clock. If they split the
    sample, or record it in turn, each must enter ``record()`` equally often between two
    ``exchange()``.
    """

    finished_steps: int
    """Optimizer steps that the loop had finished."""

    number: int
    """Number of the recording on its rank, continued from the largest of all at an exchange."""

    step: int
    """Finished optimizer steps of the weights that chose."""


class RoutingMemory:
    """Experts of N layers by sample.

    Attributes:
        experts: int16 ``(N, T, K)`` of each sample, or :data:`UNKNOWN` or :data:`OWN_CHOICE`.
        recordings: recording of each sample.
    """

    def __init__(self, num_layers: int, top_k: int) -> None:
        self._num_layers, self._top_k = num_layers, top_k
        self.experts: dict[int, np.ndarray] = {}
        self.recordings: dict[int, Recording] = {}
        self._additions_N: dict[int, np.ndarray] = {}

    def keep(
        self, recording: Recording, sample: int, positions_T: np.ndarray, ids_NTK: np.ndarray
    ) -> None:
        """Save the experts of some positions of a sample.

        They join those of the same recording, and replace those of an older one.
        """
        if self.recordings.get(sample) != recording:
            self.forget(sample)
            self.recordings[sample] = recording
        self._at_least(sample, int(positions_T.max()) + 1)[:, positions_T] = ids_NTK

    def add(self, recording: Recording, sample: int, layer: int, ids_TK: np.ndarray) -> None:
        """Replace the experts of one layer of a sample.

        Once every layer was added, the next addition begins the sample anew.

        A token with a row of :data:`UNKNOWN` chooses itself.
        """
        additions_N = self._additions_N.get(sample)
        if additions_N is None or (additions_N == additions_N[0]).all():
            self.forget(sample)
            additions_N = np.zeros(self._num_layers, dtype=np.int32)
            self._additions_N[sample] = additions_N
        additions_N[layer] += 1
        self.recordings[sample] = recording
        known_TK = self._at_least(sample, len(ids_TK))[layer]
        known_TK[len(ids_TK) :] = UNKNOWN
        known_TK[: len(ids_TK)] = np.where(ids_TK == UNKNOWN, OWN_CHOICE, ids_TK)

    def forget(self, sample: int) -> None:
        """Drop a sample."""
        for of_samples in (self.experts, self.recordings, self._additions_N):
            of_samples.pop(sample, None)

    def merge(self, memories: Sequence[tuple[dict[int, Recording], dict[int, np.ndarray]]]) -> None:
        """Keep the newest recording of each sample, joined from all ranks that have a part of it.

        ``memories`` are ``recordings`` and ``experts`` of each rank, in the same order on all.
        """
        newest: dict[int, Recording] = {}
        for recordings, _experts in memories:
            for sample, recording in recordings.items():
                newest[sample] = max(recording, newest.get(sample, recording))
        stale = [sample for sample, own in self.recordings.items() if own != newest[sample]]
        for sample in stale:
            self.forget(sample)
        whole: dict[int, np.ndarray] = {}
        for recordings, experts in memories:
            for sample, ids_NTK in experts.items():
                if recordings[sample] == newest[sample]:
                    known = whole.get(sample)
                    whole[sample] = ids_NTK if known is None else _filled(known, ids_NTK)
        self.experts, self.recordings = whole, newest

    def recall(self, samples_BL: np.ndarray, positions_BL: np.ndarray) -> np.ndarray:
        """Return the experts of tokens.

        Returns:
            int16 ``(N, B, L, K)``; :data:`UNKNOWN` for a token of no sample, :data:`OWN_CHOICE`
            for one that was added without experts.
        """
        shape = (self._num_layers, samples_BL.size, self._top_k)
        ids_NTK = np.full(shape, UNKNOWN, dtype=np.int16)
        for sample, places_T in places_of_samples(samples_BL):
            known = self.experts.get(sample)
            if known is None:
                raise JobError(
                    f"the routing of sample {sample} was never recorded: score it under record() "
                    "first, and exchange() where another rank has"
                )
            positions_T = positions_BL.flat[places_T]
            if positions_T.max() < known.shape[1]:
                ids_NTK[:, places_T] = known[:, positions_T]
            missing_N = (ids_NTK[:, places_T, 0] == UNKNOWN).any(axis=1)
            if missing_N.all():
                raise JobError(
                    f"the routing of sample {sample} was recorded for other positions than its "
                    f"{positions_T.min()} to {positions_T.max()}: score the whole sample under "
                    "one record(), exchange() where its tokens are split over ranks, and add() a "
                    "row of -1 for a token that another engine has not routed"
                )
            additions_N = self._additions_N.get(sample, np.zeros(self._num_layers))
            if missing_N.any() or (additions_N != additions_N[0]).any():
                raise JobError(
                    f"sample {sample} was not added for all MoE layers: add() it for each of them"
                )
        return ids_NTK.reshape(self._num_layers, *samples_BL.shape, self._top_k)

    def _at_least(self, sample: int, length: int) -> np.ndarray:
        """Return the saved experts of a sample, with room for ``length`` tokens."""
        known = self.experts.get(sample)
        if known is None:
            known = np.full((self._num_layers, 0, self._top_k), UNKNOWN, dtype=np.int16)
        self.experts[sample] = known = _longer(known, length)
        return known


def _longer(ids_NTK: np.ndarray, length: int) -> np.ndarray:
    added = max(length - ids_NTK.shape[1], 0)
    if not added:
        return ids_NTK
    return np.pad(ids_NTK, ((0, 0), (0, added), (0, 0)), constant_values=UNKNOWN)


def _filled(known_NTK: np.ndarray, other_NTK: np.ndarray) -> np.ndarray:
    """Fill unknown experts of a sample with those of another part of it."""
    length = max(known_NTK.shape[1], other_NTK.shape[1])
    known_NTK, other_NTK = _longer(known_NTK, length), _longer(other_NTK, length)
    return np.where(known_NTK == UNKNOWN, other_NTK, known_NTK)


def places_of_samples(samples_BL: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each sample of some tokens, and the indices of its tokens in the flattened array."""
    order = np.argsort(samples_BL, axis=None, kind="stable")
    samples, begins = np.unique(samples_BL.flat[order], return_index=True)
    for sample, places_T in zip(samples, np.split(order, begins[1:]), strict=True):
        if sample >= 0:
            yield int(sample), places_T


def positions_in_order(samples_BS: np.ndarray) -> np.ndarray:
    """Compute the position of each token in a sample that begins where it begins in its row."""
    index_S = np.arange(samples_BS.shape[1])
    begins_BS = np.ones_like(samples_BS, dtype=bool)
    begins_BS[:, 1:] = samples_BS[:, 1:] != samples_BS[:, :-1]
    return index_S - np.maximum.accumulate(np.where(begins_BS, index_S, 0), axis=1)
