"""Files of loads as record batches, streamed, so that a file may be larger than the memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import csv, json, parquet
from rich.progress import Progress

from titan_moe_lb.commands.import_loads.table_form import NUMBERS
from titan_moe_lb.errors import JobError
from titan_moe_lb.traces.columns import array_of, count_lists

KINDS = (".csv", ".tsv", ".jsonl", ".parquet", ".npy")
"""Suffixes of the files that can be read."""


def record_batches(path: Path, progress: Progress) -> Iterator[pa.RecordBatch]:
    """Read the rows of a file in their order.

    Args:
        path: file, whose suffix names its kind.
        progress: bar that shows how much of the file was read.

    Raises:
        JobError: the file is missing, damaged, or of another kind.
    """
    kind = path.suffix.lower()
    if "tfevents" in path.name:
        raise JobError(
            f"{path} has scalars, not the tokens of each expert: give a logged overload factor to "
            "plan, as --imbalance overload:FACTOR@EP"
        )
    if kind not in KINDS:
        raise JobError(f"{path} is of no known kind: give {', '.join(KINDS)}")
    try:
        if kind == ".npy":
            yield from _of_array(np.load(path, mmap_mode="r", allow_pickle=False), path)
            return
        with progress.open(path, "rb", description=path.name) as file:
            if kind in (".csv", ".tsv"):
                delimiter = "\t" if kind == ".tsv" else ","
                yield from csv.open_csv(
                    file,
                    parse_options=csv.ParseOptions(delimiter=delimiter),
                    # A number that is logged rarely may be empty in the rows that tell the types.
                    convert_options=csv.ConvertOptions(
                        column_types=dict.fromkeys(NUMBERS, pa.float64())
                    ),
                )
            elif kind == ".jsonl":
                options = json.ParseOptions(explicit_schema=_named_numbers(path))
                yield from json.open_json(file, parse_options=options)
            else:
                yield from parquet.ParquetFile(file).iter_batches()
    except JobError:
        raise
    except FileNotFoundError:
        raise JobError(f"{path}: there is no such file") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise JobError(f"{path} cannot be read: {str(error).partition(chr(10))[0]}") from None


def _named_numbers(path: Path) -> pa.Schema:
    """Return a schema of the numbers of a step that any line has.

    pyarrow takes the other columns from the first block, which may lack a number that is logged
    rarely. A number in quotes is left to it.
    """
    found: set[str] = set()
    patterns = {name: re.compile(rb'"%s"\s*:\s*[-\d]' % name.encode()) for name in NUMBERS}
    with path.open("rb") as lines:
        for line in lines:
            found |= {name for name, pattern in patterns.items() if pattern.search(line)}
    return pa.schema([(name, pa.float64()) for name in NUMBERS if name in found])


def _of_array(counts_SME: np.ndarray, path: Path) -> Iterator[pa.RecordBatch]:
    """Make a batch of each step; steps are numbered from 1, layers from 0."""
    if not isinstance(counts_SME, np.ndarray) or counts_SME.ndim != 3 or not counts_SME.size:
        raise JobError(f"{path} is no array (steps, layers, experts): save one by numpy.save")
    for step, counts_ME in enumerate(counts_SME, start=1):
        layers_M = np.arange(len(counts_ME))
        columns = [array_of(np.full(len(layers_M), step)), array_of(layers_M)]
        counts = count_lists(counts_ME, pa.from_numpy_dtype(counts_ME.dtype))
        yield pa.record_batch([*columns, counts], names=["step", "layer", "tokens"])
