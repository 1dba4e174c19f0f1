"""Schema of a trace: its columns, with the description of the run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pyarrow as pa

from titan_moe_lb.errors import JobError
from titan_moe_lb.traces.columns import MICRO_BATCH, Column, all_columns, always
from titan_moe_lb.traces.run_info import RunInfo


def schema_of(info: RunInfo) -> pa.Schema:
    """Return the schema of a new trace.

    Raises:
        JobError: two columns have the same name.
    """
    types = all_columns(info.num_experts, info.columns)
    return pa.schema(list(types.items()), metadata=info.metadata())


def info_of(schema: pa.Schema, path: Path) -> RunInfo:
    """Read the description of a trace's run, and add float columns that it does not declare.

    Raises:
        JobError: the schema is no schema of a trace.
    """
    info = RunInfo.of_schema(schema, path)
    found = dict(zip(schema.names, schema.types, strict=True))
    floats = {name for name, kind in found.items() if kind == pa.float64()}
    declared = {column.name for column in info.columns}
    types = all_columns(info.num_experts, ())
    if (
        len(found) != len(schema)
        or always(info.num_experts).items() - found.items()
        or found.get(MICRO_BATCH, types[MICRO_BATCH]) != types[MICRO_BATCH]
        or declared & found.keys() - floats
    ):
        raise JobError(f"{path} has other columns than a trace: it is damaged, use another run")
    others = [Column(name) for name in found if name in floats - declared]
    return dataclasses.replace(info, columns=(*info.columns, *others))
