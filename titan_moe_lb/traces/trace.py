"""Trace of a run: the load of every MoE layer in every logged step, in ``moe_load.arrow``.

Each logged step is one record batch with a row for each MoE layer. Readers find the columns of
``columns`` by name.

Shape suffixes: S = logged steps, M = MoE layers, E = experts.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from titan_moe_lb.errors import JobError
from titan_moe_lb.traces.batch_reader import BatchReader, step_of
from titan_moe_lb.traces.columns import MICRO_BATCH, batch_of, values_of
from titan_moe_lb.traces.run_info import RunInfo
from titan_moe_lb.traces.schema import info_of, schema_of
from titan_moe_lb.traces.step_file import StepFile
from titan_moe_lb.traces.step_load import StepLoad

FILE_NAME = "moe_load.arrow"
MOST_BYTES = 1 << 27
"""Memory for the counts of a trace in a command: of a longer one it reads evenly spread steps."""
_SAMPLE = (400, 10_000)
"""Fewest and most evenly spread steps, however large they are."""


class TraceWriter:
    """Writer of the trace of a run, on one rank. The file is a :class:`StepFile`."""

    def __init__(self, path: Path | str, info: RunInfo) -> None:
        """Prepare the writer; the first :meth:`write` opens the file.

        Args:
            path: the run's folder, or the file in it.
            info: description of the run; ``info.columns`` declares the columns.

        Raises:
            JobError: two columns have the same name.
        """
        self._info = info
        self._file = StepFile(
            trace_file(path), schema_of(info), self._continued, compression="zstd"
        )

    def write(self, step: int, load: StepLoad) -> None:
        """Append one step; write nothing for a model without MoE layers.

        Raises:
            ValueError: the load has a column that ``info`` does not declare.
        """
        if load.layers:
            self._file.write(step, batch_of(step, load, self._info.columns))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _continued(self, schema: pa.Schema, first_step: int) -> pa.Schema:
        earlier = info_of(schema, self._file.path)
        self._info.require_same_model(earlier, "this run", self._file.path.name)
        # A column of only one part of the run is null in the other part.
        columns = {column.name: column for column in (*earlier.columns, *self._info.columns)}
        info = dataclasses.replace(
            self._info,
            columns=tuple(columns.values()),
            placement=self._info.placement or earlier.placement,
            resumed_at=(*earlier.resumed_at, first_step),
            balanced_since=earlier.balanced_since
            if self._info.balances_like(earlier)
            else first_step,
        )
        try:
            # The columns of the file first: a file that has them all is appended to.
            return pa.unify_schemas([schema, schema_of(info)]).with_metadata(info.metadata())
        except pa.ArrowException as error:
            raise JobError(f"its columns are of other types: {error}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Trace of a run in memory."""

    path: Path
    info: RunInfo
    steps: np.ndarray
    """Optimizer step of each row, int64 ``(S,)``, ascending."""
    counts_SME: np.ndarray
    """Tokens per expert over the global batch, int64 ``(S, M, E)``."""
    micro_batch_counts_SME: np.ndarray
    """Counts of one micro-batch of each step that recorded one, int32 ``(S', M, E)``.

    S' is 0 unless ``micro_batches`` was set for the reader."""
    layer_columns: dict[str, np.ndarray]
    """Name to float64 ``(S, M)``, NaN where the number is missing."""
    step_columns: dict[str, np.ndarray]
    """Name to float64 ``(S,)``, NaN where the number is missing."""
    damage: tuple[str, ...]
    """A sentence about each damaged stretch of the file that was read."""
    is_sample: bool = False
    """True if these are evenly spread steps of a longer trace."""
    ended: bool = False
    """True if the file has the mark of its end."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the MoE layers in the whole model, ascending."""
        return self.info.layers

    @property
    def balanced_since(self) -> int:
        """Index of the first of ``steps`` with the run's present balancing."""
        return int(np.searchsorted(self.steps, self.info.balanced_since or 0))

    def over_steps(self, name: str) -> np.ndarray:
        """Summarise a column to one number per step, as its declaration says.

        Returns:
            float64 ``(S,)``, NaN where the number is missing.
        """
        if name in self.step_columns:
            return self.step_columns[name]
        for column in self.info.columns:
            if column.name == name:
                return column.over_layers(self.layer_columns[name])
        return np.full(len(self.steps), np.nan)

    def followed_by(self, later: Trace, most: int) -> Trace:
        """Join this trace and a later part of the run; keep the last ``most`` steps."""

        def joined(first: np.ndarray, second: np.ndarray) -> np.ndarray:
            return np.concatenate([first, second])[-most:]

        return dataclasses.replace(
            later,
            steps=joined(self.steps, later.steps),
            counts_SME=joined(self.counts_SME, later.counts_SME),
            layer_columns={
                k: joined(self.layer_columns[k], v) for k, v in later.layer_columns.items()
            },
            step_columns={
                k: joined(self.step_columns[k], v) for k, v in later.step_columns.items()
            },
        )

    def load(self, index: int) -> StepLoad:
        """Return the load of ``steps[index]``."""
        return StepLoad(
            layers=self.layers,
            counts_ME=self.counts_SME[index],
            layer_columns={name: v_SM[index] for name, v_SM in self.layer_columns.items()},
            step_columns={name: float(v_S[index]) for name, v_S in self.step_columns.items()},
        )


def read_trace(
    path: Path | str, *, micro_batches: bool = False, most_bytes: int | None = None
) -> Trace:
    """Read the whole steps of a run's trace.

    Args:
        path: the run's folder, or the file itself.
        micro_batches: read the counts of micro-batches too, which need at most half the memory
            of those of the steps.
        most_bytes: about the most memory for the counts of the steps. Of a longer trace, or of
            more than 10,000 steps, read evenly spread steps and the last one. Default: read all.

    Raises:
        JobError: there is no trace, the file is no trace, or it contains no step.
    """
    reader = TraceReader(path, micro_batches=micro_batches)
    steps = None if most_bytes is None else most_bytes // reader.bytes_per_step
    trace = reader.read(None if steps is None else int(np.clip(steps, *_SAMPLE)))
    if not len(trace.steps):
        raise JobError(
            f"{trace.path} holds no whole step: the run ended before its first logged step"
        )
    return trace


def last_step(path: Path | str) -> int | None:
    """Return the last whole step of a run's trace, read from its end; None if there is none.

    Raises:
        JobError: there is no trace, or the file is no trace.
    """
    return BatchReader(_existing_trace(path)).last_step()


class TraceReader:
    """Reader of a trace that may still grow.

    Attributes:
        info: description of the run; of a resumed one, as it was resumed.
    """

    def __init__(self, path: Path | str, *, micro_batches: bool = False) -> None:
        """Open the trace; the arguments are those of :func:`read_trace`.

        Raises:
            JobError: there is no trace, or the file is no trace.
        """
        self._path = _existing_trace(path)
        self._batches = BatchReader(self._path)
        self.info = info_of(self._batches.described(), self._path)
        self._layers = np.array(self.info.layers, np.int32)
        self._batches.fits = self._is_step
        names = self._batches.schema.names
        declared = {column.name for column in self.info.columns}
        self._numbers = [name for name in names if name in declared]
        self._micro_batch = [MICRO_BATCH] if micro_batches and MICRO_BATCH in names else []

    @property
    def bytes_per_step(self) -> int:
        """Memory for the counts of a step, in bytes."""
        return 8 * len(self._layers) * self.info.num_experts

    def is_shortened(self) -> bool:
        """Return True if the last step that was read is no longer there: a run was resumed."""
        return self._batches.is_shortened()

    def skip_to_last(self, steps: int) -> None:
        """Let the next read begin with the last ``steps`` steps."""
        self._batches.skip_to_last(steps)

    def read(self, most: int | None = None) -> Trace:
        """Read the steps since the last read, possibly none.

        Args:
            most: of about this many steps or more, read evenly spread ones and the last one;
                default: all.
        """
        info, layers = self.info, len(self._layers)
        columns = ["step", "layer", "counts", *self._numbers, *self._micro_batch]
        batches = self._batches.read(columns, most)
        num_steps = self._batches.count
        if num_steps:  # a resumed run may have written them
            self.info = info = info_of(self._batches.described(), self._path)
        shape_SME = (num_steps, layers, info.num_experts)
        steps, counts_SME = np.empty(num_steps, np.int64), np.empty(shape_SME, np.int64)
        singles_SME = np.empty((num_steps * len(self._micro_batch), *shape_SME[1:]), np.int32)
        values = {column.name: np.full((num_steps, layers), np.nan) for column in info.columns}
        num_singles = 0
        # Batches are copied one by one, so that memory holds the counts once.
        for index, batch in enumerate(batches):
            if not self._is_step(batch):
                raise JobError(
                    f"{self._path} holds a batch that is not one step of its layers: it is "
                    "damaged, use another run"
                )
            steps[index] = step_of(batch)
            counts_SME[index] = _counts(batch["counts"], shape_SME[1:])
            for name in self._numbers:
                values[name][index] = values_of(batch[name])
            for name in self._micro_batch:
                if not batch[name].null_count:
                    singles_SME[num_singles] = _counts(batch[name], shape_SME[1:])
                    num_singles += 1
        return Trace(
            path=self._path,
            info=info,
            steps=steps,
            counts_SME=counts_SME,
            micro_batch_counts_SME=singles_SME[:num_singles],
            layer_columns={c.name: values[c.name] for c in info.columns if c.per == "layer"},
            step_columns={c.name: values[c.name][:, 0] for c in info.columns if c.per == "step"},
            damage=tuple(self._damage(steps)),
            is_sample=self._batches.is_sample,
            ended=self._batches.ended,
        )

    def _is_step(self, batch: pa.RecordBatch) -> bool:
        """Return True if a batch is one whole step.

        It has every layer of the run and all counts, and the micro-batch counts of all layers or
        of none.
        """
        step, layer, counts = batch["step"], batch["layer"], batch["counts"]
        return (
            len(step) == len(self._layers)
            and not (step.null_count or layer.null_count or counts.null_count)
            and not counts.flatten().null_count
            and np.array_equal(values_of(layer), self._layers)
            and (values_of(step) == step_of(batch)).all()
            and all(
                batch[name].null_count in (0, len(batch)) and not batch[name].flatten().null_count
                for name in self._micro_batch
            )
        )

    def _damage(self, steps: np.ndarray) -> list[str]:
        name, reader = self._path.name, self._batches
        found = [
            f"{name} is damaged {f'after step {steps[n - 1]}' if n else 'at its first step'}: "
            f"{size} bytes there could not be read, the steps behind them are here."
            for n, size in reader.gaps
        ]
        if reader.rest:
            found.append(
                f"{name} was cut off or damaged at its end (its last {reader.rest} bytes are not a "
                f"whole step): read up to step {steps[-1] if len(steps) else 0}."
            )
        return found


def trace_file(path: Path | str) -> Path:
    """Return the path of the trace of a run, given its folder or the file. It may not exist."""
    path = Path(path)
    return path if path.suffix == ".arrow" or path.is_file() else path / FILE_NAME


def _existing_trace(path: Path | str) -> Path:
    file = trace_file(path)
    if file.is_file():
        return file
    if Path(path).is_dir():
        raise JobError(f"{path} has no {FILE_NAME}: name the folder of a run that wrote one")
    raise JobError(f"{path}: there is no such folder or file: name the folder of a run")


def _counts(lists: pa.Array, shape_ME: tuple[int, int]) -> np.ndarray:
    """Invert :func:`count_lists`."""
    return values_of(lists.flatten()).reshape(shape_ME)
