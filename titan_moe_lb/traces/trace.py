"""The trace of a run: every logged step's load of every MoE layer, in ``moe_load.arrow``.

One record batch per logged step, one row per MoE layer. docs/telemetry.md has the
columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from titan_moe_lb.errors import JobError
from titan_moe_lb.traces.run_info import RunInfo
from titan_moe_lb.traces.step_file import BatchReader, StepFile
from titan_moe_lb.traces.step_load import StepLoad

FILE_NAME = "moe_load.arrow"

_FIGURES = (
    "avg_overload_factor",
    "max_overload_factor",
    "max_cum_overload_factor",
    "micro_batch_max_violation",
)
_FIXED = ("step", "layer", "counts", *_FIGURES)


class TraceWriter:
    """Writes the trace of a run, on one rank. Survives what :class:`StepFile` survives."""

    def __init__(self, path: Path | str, info: RunInfo) -> None:
        """
        Args:
            path: the run's folder, or the file in it.
            info: of the run; one column is made for each of ``info.losses``.
        """
        self.info = info
        self._columns = tuple(info.losses)
        schema = _schema(info, self._columns)
        file = trace_file(path)
        self._file = StepFile(file, schema, self._continued, compression="zstd")

    def write(self, step: int, load: StepLoad) -> None:
        """Append one step. A model without MoE layers has no trace."""
        if load.layers:
            self._file.write(step, _batch(step, load, self._columns))

    def close(self) -> None:
        self._file.close()

    def _continued(self, schema: pa.Schema, first_step: int) -> pa.Schema:
        earlier = _info_of(schema, self._file.path)
        self.info.require_same_model(earlier, "this run", self._file.path.name)
        info = dataclasses.replace(self.info, resumed_at=(*earlier.resumed_at, first_step))
        # Losses that either part of the run has: the column is null in the other part.
        return _schema(info, dict.fromkeys([*_loss_names(schema), *self._columns]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """A run's trace in memory: S logged steps, M MoE layers, E experts."""

    path: Path
    info: RunInfo
    steps: np.ndarray
    """Optimizer step of each row, int64 ``(S,)``, ascending."""
    counts_SME: np.ndarray
    """Tokens per expert over the global batch, int64 ``(S, M, E)``."""
    losses: dict[str, np.ndarray]
    """Metric name to float64 ``(S, M)``, NaN where the layer or the step lacks the loss."""
    avg_overload_factor_SM: np.ndarray
    max_overload_factor_SM: np.ndarray
    micro_batch_max_violation_SM: np.ndarray
    max_cum_overload_factor_S: np.ndarray
    truncated: str | None
    """One sentence when the file does not end with a whole step; None when it does."""

    @property
    def layers(self) -> tuple[int, ...]:
        return self.info.layers

    def require_same_model(self, other: Trace) -> None:
        """Raises JobError, naming both, when the other trace is of another model."""
        self.info.require_same_model(other.info, str(self.path), str(other.path))


def read_trace(path: Path | str) -> Trace:
    """Read a run's trace, up to its last whole step.

    Args:
        path: the run's folder, or the file itself.

    Raises:
        JobError: there is no trace, it is not one of ours, or it holds no step.
    """
    reader = TraceReader(path)
    trace = stack(reader.info, reader.path, list(reader))
    return dataclasses.replace(trace, truncated=_sentence(reader, trace.steps))


class TraceReader:
    """Steps of a trace that may still grow: iterate again for what came since.

    Attributes:
        path, info: of the trace.
        truncated: see :class:`BatchReader`.
    """

    def __init__(self, path: Path | str) -> None:
        """Raises JobError: there is no trace, or it is not one of ours."""
        self.path = _existing_trace(path)
        self._batches = BatchReader(self.path)
        self.info = _info_of(self._batches.schema, self.path)

    @property
    def truncated(self) -> str | None:
        return self._batches.truncated

    def __iter__(self) -> Iterator[tuple[int, StepLoad]]:
        for batch in self._batches:
            yield self._step_load(batch)

    def _step_load(self, batch: pa.RecordBatch) -> tuple[int, StepLoad]:
        steps, layers = set(batch["step"].to_pylist()), tuple(batch["layer"].to_pylist())
        counts = batch["counts"]
        whole = len(steps) == 1 and None not in steps and layers == self.info.layers
        if not whole or counts.null_count or counts.flatten().null_count:
            raise JobError(
                f"{self.path} holds a batch that is not one step of its layers: it is damaged, "
                "take another run"
            )
        counts_ME = counts.flatten().to_numpy().reshape(len(layers), self.info.num_experts)
        figures = {name: _numpy(batch, name) for name in _FIGURES}
        return steps.pop(), StepLoad(
            layers=layers,
            counts_ME=counts_ME,
            losses={name: _numpy(batch, name) for name in _loss_names(batch.schema)},
            avg_overload_factor_M=figures["avg_overload_factor"],
            max_overload_factor_M=figures["max_overload_factor"],
            micro_batch_max_violation_M=figures["micro_batch_max_violation"],
            max_cum_overload_factor=float(figures["max_cum_overload_factor"][0]),
        )


def stack(info: RunInfo, path: Path, loads: list[tuple[int, StepLoad]]) -> Trace:
    """Put steps together. Raises JobError: there is none."""
    if not loads:
        raise JobError(f"{path} holds no whole step: the run ended before its first logged step")
    steps, step_loads = zip(*loads, strict=True)

    def stacked(name: str) -> np.ndarray:
        return np.stack([getattr(load, name) for load in step_loads])

    return Trace(
        path=path,
        info=info,
        steps=np.array(steps, dtype=np.int64),
        counts_SME=stacked("counts_ME"),
        losses={
            name: np.stack([load.losses[name] for load in step_loads])
            for name in step_loads[0].losses
        },
        avg_overload_factor_SM=stacked("avg_overload_factor_M"),
        max_overload_factor_SM=stacked("max_overload_factor_M"),
        micro_batch_max_violation_SM=stacked("micro_batch_max_violation_M"),
        max_cum_overload_factor_S=stacked("max_cum_overload_factor"),
        truncated=None,
    )


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


def _schema(info: RunInfo, loss_names: Iterable[str]) -> pa.Schema:
    return pa.schema(
        [
            ("step", pa.int64()),
            ("layer", pa.int32()),
            ("counts", pa.list_(pa.int64(), info.num_experts)),
            *((name, pa.float64()) for name in (*_FIGURES, *loss_names)),
        ],
        metadata=info.metadata(),
    )


def _info_of(schema: pa.Schema, path: Path) -> RunInfo:
    """The run of a trace's schema. Raises JobError: it is not that of a trace."""
    info = RunInfo.of_schema(schema, path)
    if schema.remove_metadata() != _schema(info, _loss_names(schema)).remove_metadata():
        raise JobError(f"{path} has other columns than a trace: it is damaged, take another run")
    return info


def _loss_names(schema: pa.Schema) -> list[str]:
    return [name for name in schema.names if name not in _FIXED]


def _batch(step: int, load: StepLoad, loss_names: Iterable[str]) -> pa.RecordBatch:
    num_layers, num_experts = load.counts_ME.shape
    counts = pa.array(np.ascontiguousarray(load.counts_ME, dtype=np.int64).reshape(-1))
    columns = {
        "step": pa.array(np.full(num_layers, step, dtype=np.int64)),
        "layer": pa.array(np.array(load.layers, dtype=np.int32)),
        "counts": pa.FixedSizeListArray.from_arrays(counts, num_experts),
        "avg_overload_factor": _floats(load.avg_overload_factor_M),
        "max_overload_factor": _floats(load.max_overload_factor_M),
        "max_cum_overload_factor": _floats(np.full(num_layers, load.max_cum_overload_factor)),
        "micro_batch_max_violation": _floats(load.micro_batch_max_violation_M),
    }
    for name in loss_names:
        columns[name] = _floats(load.losses.get(name, np.full(num_layers, np.nan)))
    return pa.record_batch(columns)


def _floats(values: np.ndarray) -> pa.Array:
    """float64 with NaN as null, which every reader of Arrow knows as missing."""
    values = np.asarray(values, dtype=np.float64)
    return pa.array(values, mask=np.isnan(values))


def _numpy(batch: pa.RecordBatch, name: str) -> np.ndarray:
    return batch.column(name).to_numpy(zero_copy_only=False)


def _sentence(reader: TraceReader, steps: np.ndarray) -> str | None:
    if reader.truncated is None:
        return None
    return (
        f"{reader.path.name} was cut off while a step was written ({reader.truncated}): "
        f"read up to step {steps[-1]}."
    )
