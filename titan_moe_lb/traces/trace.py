"""The trace of a run: every logged step's load of every MoE layer, in ``moe_load.arrow``.

One record batch per logged step, one row per MoE layer: ``step``, ``layer``, ``counts``,
``micro_batch_counts``, and a column for each declared :class:`Column`. Columns are read by name.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from titan_moe_lb.errors import JobError
from titan_moe_lb.traces.batch_reader import BatchReader
from titan_moe_lb.traces.column import Column
from titan_moe_lb.traces.run_info import RunInfo
from titan_moe_lb.traces.step_file import StepFile
from titan_moe_lb.traces.step_load import StepLoad

FILE_NAME = "moe_load.arrow"


class TraceWriter:
    """Writes the trace of a run, on one rank. Survives what :class:`StepFile` survives."""

    def __init__(self, path: Path | str, info: RunInfo) -> None:
        """
        Args:
            path: the run's folder, or the file in it.
            info: of the run; one column is made for each of ``info.figures``.

        Raises:
            JobError: two figures have one name, or that of a column that is always there.
        """
        self._info = info
        self._file = StepFile(trace_file(path), _schema(info), self._continued, compression="zstd")

    def write(self, step: int, load: StepLoad) -> None:
        """Append one step. A model without MoE layers has no trace.

        Raises:
            ValueError: the load has a figure that ``info`` does not declare.
        """
        if load.layers:
            self._file.write(step, _batch(step, load, self._info.figures))

    def close(self) -> None:
        self._file.close()

    def _continued(self, schema: pa.Schema, first_step: int) -> pa.Schema:
        earlier = _info_of(schema, self._file.path)
        self._info.require_same_model(earlier, "this run", self._file.path.name)
        # Figures that either part of the run has: the column is null in the other part.
        figures = {figure.name: figure for figure in (*earlier.figures, *self._info.figures)}
        info = dataclasses.replace(
            self._info,
            figures=tuple(figures.values()),
            placement=self._info.placement or earlier.placement,
            resumed_at=(*earlier.resumed_at, first_step),
        )
        try:
            return pa.unify_schemas([_schema(info), schema])
        except pa.ArrowException as error:
            raise JobError(f"its columns are of other types: {error}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """A run's trace in memory: S logged steps, M MoE layers, E experts."""

    path: Path
    info: RunInfo
    steps: np.ndarray
    """Optimizer step of each row, int64 ``(S,)``, ascending."""
    counts_SME: np.ndarray
    """Tokens per expert over the global batch, int64 ``(S, M, E)``."""
    micro_batch_counts_SME: np.ndarray
    """The same of one micro-batch of each step, int32 ``(S', M, E)``: of those S' steps that
    have recorded one, which in a trace of an older version are none; none unless asked for."""
    figures: dict[str, np.ndarray]
    """Name to float64 ``(S, M)``, NaN where the layer or the step lacks the figure."""
    step_columns: dict[str, np.ndarray]
    """Name to float64 ``(S,)``."""
    damage: tuple[str, ...]
    """A sentence for each stretch of the file that could not be read."""

    @property
    def layers(self) -> tuple[int, ...]:
        return self.info.layers

    def over_steps(self, name: str) -> np.ndarray:
        """A figure as one number per step, float64 ``(S,)``: layers summarised as it declares.

        NaN where the trace lacks it.
        """
        if name in self.step_columns:
            return self.step_columns[name]
        for figure in self.info.figures:
            if figure.name == name:
                return figure.over_layers(self.figures[name])
        return np.full(len(self.steps), np.nan)

    def followed_by(self, later: Trace, most: int) -> Trace:
        """The last ``most`` steps of this and a later part of one run."""

        def joined(first: np.ndarray, second: np.ndarray) -> np.ndarray:
            return np.concatenate([first, second])[-most:]

        return dataclasses.replace(
            later,
            steps=joined(self.steps, later.steps),
            counts_SME=joined(self.counts_SME, later.counts_SME),
            figures={k: joined(self.figures[k], v) for k, v in later.figures.items()},
            step_columns={
                k: joined(self.step_columns[k], v) for k, v in later.step_columns.items()
            },
        )

    def load(self, index: int) -> StepLoad:
        """The load of ``steps[index]``."""
        return StepLoad(
            layers=self.layers,
            counts_ME=self.counts_SME[index],
            figures={name: values_SM[index] for name, values_SM in self.figures.items()},
            step_columns={name: float(v_S[index]) for name, v_S in self.step_columns.items()},
        )


def read_trace(path: Path | str, *, micro_batches: bool = False) -> Trace:
    """Read a run's trace: every step that is whole.

    Args:
        path: the run's folder, or the file itself.
        micro_batches: with their counts, half as many bytes again as those of the steps.

    Raises:
        JobError: there is no trace, it is not one of ours, or it holds no step.
    """
    trace = TraceReader(path, micro_batches=micro_batches).read()
    if not len(trace.steps):
        raise JobError(
            f"{trace.path} holds no whole step: the run ended before its first logged step"
        )
    return trace


class TraceReader:
    """Steps of a trace that may still grow.

    Attributes:
        info: of the run.
    """

    def __init__(self, path: Path | str, *, micro_batches: bool = False) -> None:
        """As :func:`read_trace`. Raises JobError: there is no trace, or it is not one of ours."""
        self._path = _existing_trace(path)
        self._batches = BatchReader(self._path)
        self.info = _info_of(self._batches.schema, self._path)
        self._layers = pa.array(self.info.layers, pa.int32())
        names = self._batches.schema.names
        figures = {figure.name for figure in self.info.figures}
        self._numbers = ["step", *(name for name in names if name in figures)]
        self._micro_batch = [MICRO_BATCH] if micro_batches and MICRO_BATCH in names else []

    def read(self) -> Trace:
        """The steps that came since the last read; there may be none."""
        shape_ME = (len(self._layers), self.info.num_experts)
        columns = [*self._numbers, "layer", "counts", *self._micro_batch]
        batches = self._whole(self._batches.read(self._is_step, columns))
        first = next(batches, None)
        num_steps = 0 if first is None else self._batches.count
        counts_SME = np.empty((num_steps, *shape_ME), np.int64)
        micro_batch_counts_SME = np.empty((num_steps * len(self._micro_batch), *shape_ME), np.int32)
        numbers, num_micro_batches = [], 0
        # Counts go into their place batch by batch, so that they are held once.
        for index, batch in enumerate(() if first is None else itertools.chain([first], batches)):
            numbers.append(batch.select(self._numbers))
            counts_SME[index] = _counts(batch["counts"], shape_ME)
            for name in self._micro_batch:
                if not batch[name].null_count:
                    micro_batch_counts_SME[num_micro_batches] = _counts(batch[name], shape_ME)
                    num_micro_batches += 1
        table = pa.Table.from_batches(
            numbers, pa.schema(map(self._batches.schema.field, self._numbers))
        )
        shape_SM = (num_steps, len(self._layers))
        steps = table["step"].to_numpy().reshape(shape_SM)[:, 0]

        def recorded(per: str) -> dict[str, np.ndarray]:
            return {
                figure.name: table[figure.name].to_numpy().reshape(shape_SM)
                if figure.name in self._numbers
                else np.full(shape_SM, np.nan)
                for figure in self.info.figures
                if figure.per == per
            }

        return Trace(
            path=self._path,
            info=self.info,
            steps=steps,
            counts_SME=counts_SME,
            micro_batch_counts_SME=micro_batch_counts_SME[:num_micro_batches],
            figures=recorded("layer"),
            step_columns={name: values_SM[:, 0] for name, values_SM in recorded("step").items()},
            damage=tuple(self._damage(steps)),
        )

    def _whole(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            if not self._is_step(batch):
                raise JobError(
                    f"{self._path} holds a batch that is not one step of its layers: it is "
                    "damaged, take another run"
                )
            yield batch

    def _is_step(self, batch: pa.RecordBatch) -> bool:
        """One step, each of the run's layers, all counts there; of a micro-batch all or none."""
        step, counts = batch["step"], batch["counts"]
        return (
            batch["layer"].equals(self._layers)
            and not (step.null_count or counts.null_count or counts.flatten().null_count)
            and len(step.unique()) == 1
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
    """The trace in a run's folder, or the file itself. It may not exist."""
    path = Path(path)
    return path if path.suffix == ".arrow" or path.is_file() else path / FILE_NAME


def _existing_trace(path: Path | str) -> Path:
    file = trace_file(path)
    if file.is_file():
        return file
    if Path(path).is_dir():
        raise JobError(f"{path} has no {FILE_NAME}: name the folder of a run that wrote one")
    raise JobError(f"{path}: there is no such folder or file: name the folder of a run")


MICRO_BATCH = "micro_batch_counts"


def _always(num_experts: int) -> dict[str, pa.DataType]:
    """The columns of every trace."""
    return {
        "step": pa.int64(),
        "layer": pa.int32(),
        "counts": pa.list_(pa.int64(), num_experts),
    }


def _micro_batch_lists(num_experts: int) -> pa.DataType:
    return pa.list_(pa.int32(), num_experts)


def _schema(info: RunInfo) -> pa.Schema:
    columns = _always(info.num_experts) | {MICRO_BATCH: _micro_batch_lists(info.num_experts)}
    for figure in info.figures:
        if figure.name in columns:
            raise JobError(
                f"two columns of the trace would be called {figure.name!r}: give the metric "
                "another name"
            )
        columns[figure.name] = pa.float64()
    return pa.schema(list(columns.items()), metadata=info.metadata())


def _info_of(schema: pa.Schema, path: Path) -> RunInfo:
    """The run of a trace's schema, with a figure for every column that none declares.

    Raises:
        JobError: it is not that of a trace.
    """
    info = RunInfo.of_schema(schema, path)
    always, lists = _always(info.num_experts), _micro_batch_lists(info.num_experts)
    types = dict(zip(schema.names, schema.types, strict=True))
    declared = {figure.name for figure in info.figures}
    floats = {name for name, type_ in types.items() if type_ == pa.float64()}
    if (
        len(types) != len(schema)
        or always.items() - types.items()
        or types.get(MICRO_BATCH, lists) != lists
        or declared & types.keys() - floats
    ):
        raise JobError(f"{path} has other columns than a trace: it is damaged, take another run")
    others = [Column(name) for name in types if name in floats - declared]
    return dataclasses.replace(info, figures=(*info.figures, *others))


def _batch(step: int, load: StepLoad, figures: tuple[Column, ...]) -> pa.RecordBatch:
    num_layers, num_experts = load.counts_ME.shape
    columns = {
        "step": pa.array(np.full(num_layers, step, dtype=np.int64)),
        "layer": pa.array(np.array(load.layers, dtype=np.int32)),
        "counts": _lists(load.counts_ME, pa.int64()),
        MICRO_BATCH: pa.nulls(num_layers, _micro_batch_lists(num_experts))
        if load.micro_batch_counts_ME is None
        else _lists(load.micro_batch_counts_ME, pa.int32()),
    }
    recorded = load.figures | load.step_columns
    for figure in figures:
        values = np.full(num_layers, recorded.pop(figure.name, np.nan), dtype=np.float64)
        # A missing number is null, as every reader of Arrow knows it.
        columns[figure.name] = pa.array(values, mask=np.isnan(values))
    if recorded:
        raise ValueError(f"figures {sorted(recorded)} are not among the declared ones")
    return pa.record_batch(columns)


def _counts(lists: pa.Array, shape_ME: tuple[int, int]) -> np.ndarray:
    """What :func:`_lists` was made of."""
    return lists.flatten().to_numpy().reshape(shape_ME)


def _lists(counts_ME: np.ndarray, kind: pa.DataType) -> pa.Array:
    """One list for each layer."""
    values = np.ascontiguousarray(counts_ME, dtype=kind.to_pandas_dtype()).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(pa.array(values, kind), counts_ME.shape[1])
