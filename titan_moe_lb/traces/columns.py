"""Columns of the trace: fixed ones, and ones that the job declares."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from titan_moe_lb.errors import JobError
from titan_moe_lb.traces.step_load import StepLoad

MICRO_BATCH = "micro_batch_counts"
"""Column of the counts of one micro-batch. It may be null, and a foreign trace may lack it."""


@dataclass(frozen=True, slots=True)
class Column:
    """Declaration of one named number, either of each layer or of the step."""

    name: str
    per: Literal["layer", "step"] = "layer"
    summary: Literal["mean", "max", "sum"] = "mean"
    """Reduction over the layers."""
    is_aux_loss: bool = False
    description: str = ""
    """One line of text for the chart in the report."""
    title: str = ""

    @property
    def heading(self) -> str:
        """Title for people; by default the name with spaces."""
        return self.title or self.name.replace("_", " ")

    def over_layers(self, values: np.ndarray) -> np.ndarray:
        """Reduce float64 ``(..., M)`` to ``(...)`` and skip NaNs; NaN if all are NaN."""
        known = np.ma.masked_where(np.isnan(values), values)
        return np.ma.filled(getattr(known, self.summary)(axis=-1), np.nan)


def always(num_experts: int) -> dict[str, pa.DataType]:
    """Return names and types of the columns of every trace."""
    return {"step": pa.int64(), "layer": pa.int32(), "counts": pa.list_(pa.int64(), num_experts)}


def all_columns(num_experts: int, columns: Iterable[Column]) -> dict[str, pa.DataType]:
    """Return names and types of the columns of a new trace.

    Raises:
        JobError: two columns have the same name.
    """
    types = always(num_experts) | {MICRO_BATCH: pa.list_(pa.int32(), num_experts)}
    for column in columns:
        if column.name in types:
            raise JobError(
                f"two columns of the trace would be called {column.name!r}: give the metric "
                "another name"
            )
        types[column.name] = pa.float64()
    return types


def batch_of(step: int, load: StepLoad, columns: Iterable[Column]) -> pa.RecordBatch:
    """Convert one step to a record batch with a row for each layer.

    Raises:
        ValueError: the load has a column that is not declared.
    """
    num_layers, num_experts = load.counts_ME.shape
    arrays = {
        "step": array_of(np.full(num_layers, step, dtype=np.int64)),
        "layer": array_of(np.array(load.layers, dtype=np.int32)),
        "counts": count_lists(load.counts_ME, pa.int64()),
        MICRO_BATCH: pa.nulls(num_layers, pa.list_(pa.int32(), num_experts))
        if load.micro_batch_counts_ME is None
        else count_lists(load.micro_batch_counts_ME, pa.int32()),
    }
    recorded = load.layer_columns | load.step_columns
    for column in columns:
        values = np.full(num_layers, recorded.pop(column.name, np.nan), dtype=np.float64)
        arrays[column.name] = array_of(values)
    if recorded:
        raise ValueError(f"columns {sorted(recorded)} are not declared")
    return pa.record_batch(arrays)


def count_lists(counts: np.ndarray, kind: pa.DataType) -> pa.Array:
    """Convert counts ``(rows, E)`` to Arrow lists of fixed length, one for each row."""
    values = np.ascontiguousarray(counts, dtype=kind.to_pandas_dtype()).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(array_of(values), counts.shape[1])


def array_of(values: np.ndarray) -> pa.Array:
    """Convert numbers ``(N,)`` to an Arrow array without a copy; a NaN becomes null.

    pyarrow's own conversions import pandas where it is installed, for half a second.
    """
    known = None
    if values.dtype.kind == "f" and np.isnan(values).any():
        known = pa.py_buffer(np.packbits(~np.isnan(values), bitorder="little"))
    kind = pa.from_numpy_dtype(values.dtype)
    return pa.Array.from_buffers(kind, len(values), [known, pa.py_buffer(values)])


def values_of(array: pa.Array) -> np.ndarray:
    """Invert :func:`array_of`, without a copy unless a null becomes NaN."""
    valid, content = array.buffers()
    values = np.frombuffer(content, array.type.to_pandas_dtype())
    values = values[array.offset : array.offset + len(array)]
    if not array.null_count:
        return values
    bits = np.unpackbits(np.frombuffer(valid, np.uint8), bitorder="little")
    return np.where(bits[array.offset : array.offset + len(array)], values, np.nan)
