"""Experts of every token in the recorded steps, which ``Replay`` replays.

Every rank writes its own file, such as ``routing/rank_00003.arrow``. Each row contains its
sequences and positions in the global batch, so the reader can assemble a batch from any layout. It
raises if the rows do not cover the whole batch.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from titan_moe_lb.errors import JobError
from titan_moe_lb.traces.batch_reader import BatchReader
from titan_moe_lb.traces.run_info import RunInfo
from titan_moe_lb.traces.step_file import StepFile

FOLDER = "routing"


class RoutingTraceWriter:
    """Writer of the file of one rank. The file is a :class:`StepFile`."""

    def __init__(self, run_dir: Path | str, info: RunInfo, rank: int) -> None:
        self.info = info
        self._id_type = _id_type(info.num_experts)
        path = Path(run_dir) / FOLDER / f"rank_{rank:05d}.arrow"
        # Expert ids hardly compress, and a reader can map an uncompressed file.
        self._file = StepFile(path, _schema(info), self._continued, compression=None)

    def write(
        self,
        *,
        step: int,
        layer: int,
        first_sequence: int,
        token_slices: Sequence[tuple[int, int]],
        expert_ids_BLK: np.ndarray,
    ) -> None:
        """Append the experts that one router chose in one forward.

        Args:
            step: optimizer step.
            layer: number of the layer in the whole model.
            first_sequence: index of the first of the B sequences in the global batch.
            token_slices: (start, length) of each slice of a sequence that the L local positions
                cover, in order; ``[(0, seq_len)]`` unless ranks split sequences.
            expert_ids_BLK: chosen experts ``(B, L, K)``, integers in [0, E).

        Raises:
            ValueError: ``expert_ids_BLK`` does not have L positions and K experts.
        """
        ids = np.asarray(expert_ids_BLK)
        length = sum(length for _start, length in token_slices)
        top_k = self.info.top_k_of(layer)
        if ids.shape[1:] != (length, top_k):
            raise ValueError(f"expert ids {ids.shape} are not (B, {length}, {top_k})")
        slices = [{"start": start, "length": length} for start, length in token_slices]
        flat = np.ascontiguousarray(ids, dtype=self._id_type).reshape(-1)
        row = {
            "step": pa.array([step], pa.int64()),
            "layer": pa.array([layer], pa.int32()),
            "first_sequence": pa.array([first_sequence], pa.int64()),
            "num_sequences": pa.array([ids.shape[0]], pa.int32()),
            "token_slices": pa.array([slices], _SLICES),
            "expert_ids": pa.LargeListArray.from_arrays([0, flat.size], pa.array(flat)),
        }
        self._file.write(step, pa.record_batch(row))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _continued(self, schema: pa.Schema, first_step: int) -> pa.Schema:
        earlier = _info_of(schema, self._file.path)
        if _parts_of(earlier) != _parts_of(self.info):
            raise JobError("it is of another model or layout")
        return schema


class RoutingTrace:
    """Routing of the recorded steps. :meth:`expert_ids` loads one step of one layer.

    Attributes:
        folder: folder of the files of the ranks.
        info: description of the run.
        steps, layers: recorded steps and layers, ascending.
    """

    def __init__(self, run_dir: Path | str) -> None:
        """Map the files of all ranks.

        Args:
            run_dir: the run's folder, or the ``routing`` folder in it.

        Raises:
            JobError: there is no routing trace, a file is no part of one, or the files differ in
                model or layout.
        """
        self.folder = _folder(run_dir)
        files = sorted(self.folder.glob("rank_*.arrow"))
        if not files:
            raise JobError(
                f"{self.folder} holds no routing trace: name the folder of a run that recorded "
                "its routing"
            )
        self._parts: dict[tuple[int, int], list[pa.RecordBatch]] = defaultdict(list)
        self._damaged: list[str] = []
        self.info = self._read(files[0])
        for file in files[1:]:
            info = self._read(file)
            if _parts_of(info) != _parts_of(self.info):
                raise JobError(
                    f"{file.name} and {files[0].name} in {self.folder} are of two models or "
                    "layouts: record into an empty folder"
                )
        ranks = {int(file.stem.removeprefix("rank_")) for file in files}
        missing = (rank for rank in range(self.info.world_size) if rank not in ranks)
        self._missing_ranks = list(itertools.islice(missing, 9))
        self.steps = tuple(sorted({step for step, _layer in self._parts}))
        self.layers = tuple(sorted({layer for _step, layer in self._parts}))

    def _read(self, file: Path) -> RunInfo:
        reader = BatchReader(file)
        info = _info_of(reader.schema, file)
        reader.fits = lambda row: _fits(row, info)
        for row in reader.read():
            self._parts[row["step"][0].as_py(), row["layer"][0].as_py()].append(row)
        if reader.gaps:
            self._damaged.append(f"{file.name} is damaged")
        if reader.rest:
            self._damaged.append(f"{file.name} was cut off or damaged at its end")
        return info

    def expert_ids(self, step: int, layer: int, sequences: range | None = None) -> np.ndarray:
        """Assemble the experts of each token, in the order of the global batch.

        Args:
            step: recorded step.
            layer: recorded layer.
            sequences: indices in the global batch, a range of step 1; default: the whole batch.

        Returns:
            ``(B, L, K)`` of the smallest unsigned integer type that holds E - 1: B sequences of
            L = seq_len tokens, K experts each.

        Raises:
            JobError: a token of these sequences is missing, two ranks recorded different experts
                for one token, or the trace is damaged or too large for memory.
        """
        info = self.info
        sequences = range(info.global_batch_size) if sequences is None else sequences
        first, last = sequences.start, sequences.stop
        shape = (last - first, info.seq_len, info.top_k_of(layer))
        try:
            ids_BLK = np.zeros(shape, _id_type(info.num_experts))
            filled_BL = np.zeros(shape[:2], dtype=bool)
        except (MemoryError, ValueError):
            raise JobError(
                f"{self.folder} says that a step has {shape[0]:,} sequences of {shape[1]:,} tokens, "
                "more than this machine has memory for: it is damaged, or ask for fewer sequences"
            ) from None
        for part in self._parts.get((step, layer), ()):
            start = part["first_sequence"][0].as_py()
            stop = start + part["num_sequences"][0].as_py()
            low, high = max(start, first), min(stop, last)
            if low >= high:
                continue
            slices = part["token_slices"][0].as_py()
            values = part["expert_ids"].flatten().to_numpy()
            part_BLK = values.reshape(stop - start, -1, shape[-1])[low - start : high - start]
            offset = 0
            for piece in slices:
                rows = slice(low - first, high - first)
                columns = slice(piece["start"], piece["start"] + piece["length"])
                new_BLK = part_BLK[:, offset : offset + piece["length"]]
                offset += piece["length"]
                # Tensor-parallel ranks may have recorded the same tokens.
                again_BL = filled_BL[rows, columns]
                if (ids_BLK[rows, columns][again_BL] != new_BLK[again_BL]).any():
                    raise JobError(
                        f"{self.folder}: two ranks recorded different experts for the same "
                        f"tokens of step {step}, layer {layer}: record the run again"
                    )
                ids_BLK[rows, columns] = new_BLK
                filled_BL[rows, columns] = True
        if not filled_BL.all():
            raise JobError(self._why_not_whole(step, layer, first, filled_BL))
        num_experts = info.num_experts_M[info.layers.index(layer)]
        if ids_BLK.size and ids_BLK.max() >= num_experts:
            raise JobError(
                f"{self.folder} names expert {ids_BLK.max()} of {num_experts} in step {step}, "
                f"layer {layer}: it is damaged, record the run again"
            )
        return ids_BLK

    def _why_not_whole(self, step: int, layer: int, first: int, filled_BL: np.ndarray) -> str:
        where = f"step {step}, layer {layer}"
        if step not in self.steps:
            recorded = ", ".join(map(str, self.steps[:8])) + ("..." if len(self.steps) > 8 else "")
            return f"{self.folder} has no step {step}: it holds steps {recorded or 'none'}"
        sequence, position = np.unravel_index(np.argmin(filled_BL), filled_BL.shape)
        reasons = []
        if self._missing_ranks:
            ranks = ", ".join(map(str, self._missing_ranks[:8]))
            more = "..." if len(self._missing_ranks) > 8 else ""
            reasons.append(f"the file of rank {ranks}{more} is missing")
        reasons += self._damaged[:8]
        reason = " and ".join(reasons) or "the run did not record it"
        return (
            f"{self.folder}: {(~filled_BL).sum()} tokens of {where} are missing, the first at "
            f"sequence {first + sequence}, position {position}, because {reason}: take a step "
            "that every rank recorded whole"
        )


def open_routing_trace(run_dir: Path | str) -> RoutingTrace:
    """Open a :class:`RoutingTrace`, or return the open one if its files have not changed."""
    folder = _folder(run_dir).resolve()
    files = [(file, file.stat().st_mtime_ns) for file in folder.glob("rank_*.arrow")]
    return _opened(folder, frozenset(files))


@functools.lru_cache(maxsize=1)
def _opened(folder: Path, files: frozenset[tuple[Path, int]]) -> RoutingTrace:
    return RoutingTrace(folder)


def _folder(run_dir: Path | str) -> Path:
    run_dir = Path(run_dir)
    return run_dir if run_dir.name == FOLDER else run_dir / FOLDER


_SLICES = pa.list_(pa.struct([("start", pa.int32()), ("length", pa.int32())]))


def _schema(info: RunInfo) -> pa.Schema:
    return pa.schema(
        [
            ("step", pa.int64()),
            ("layer", pa.int32()),
            ("first_sequence", pa.int64()),
            ("num_sequences", pa.int32()),
            ("token_slices", _SLICES),
            ("expert_ids", pa.large_list(pa.from_numpy_dtype(_id_type(info.num_experts)))),
        ],
        metadata=info.metadata(),
    )


def _info_of(schema: pa.Schema, file: Path) -> RunInfo:
    """Read the description of the run from a file's schema.

    Raises:
        JobError: the schema is no schema of a routing trace.
    """
    info = RunInfo.of_schema(schema, file)
    if schema.remove_metadata() != _schema(info).remove_metadata():
        raise JobError(f"{file} has other columns than a routing trace: it is damaged")
    return info


def _fits(row: pa.RecordBatch, info: RunInfo) -> bool:
    """Return True if a row is complete and fits a global batch of this run."""
    if row.num_rows != 1 or any(column.null_count for column in row.columns):
        return False
    first, count = row["first_sequence"][0].as_py(), row["num_sequences"][0].as_py()
    slices = [(piece["start"], piece["length"]) for piece in row["token_slices"][0].as_py()]
    layer = row["layer"][0].as_py()
    if layer not in info.layers:
        return False
    num_ids = count * sum(length for _start, length in slices) * info.top_k_of(layer)
    return (
        first >= 0
        and count >= 0
        and first + count <= info.global_batch_size
        and all(start >= 0 and n >= 0 and start + n <= info.seq_len for start, n in slices)
        and len(row["expert_ids"].flatten()) == num_ids
    )


def _id_type(num_experts: int) -> np.dtype:
    return np.min_scalar_type(num_experts - 1)


def _parts_of(info: RunInfo) -> RunInfo:
    """Return the fields of the description that the files of all ranks share."""
    return dataclasses.replace(info, started="", version="", resumed_at=())
