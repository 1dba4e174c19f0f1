"""Steps of a table of loads, in the order of its rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from titan_moe_lb.commands.import_loads.table_form import NUMBERS, TableForm
from titan_moe_lb.errors import JobError


@dataclass(frozen=True, slots=True)
class Step:
    """Loads of one step."""

    number: int
    counts: dict[int, np.ndarray]
    """Layer to the tokens of its experts ``(E,)``."""
    numbers: dict[str, float]


class StepReader:
    """Reader of the steps of a table, which needs the memory of one step and one batch.

    Attributes:
        num_experts: experts of every layer, if the caller knows; else the first step tells.
    """

    def __init__(self, num_experts: int | None) -> None:
        """Prepare the reader for one or more tables of one run."""
        self.num_experts = num_experts
        self._sizes: dict[int, int] | None = None

    def read(self, batches: Iterator[pa.RecordBatch], file: str) -> Iterator[Step]:
        """Read the steps of one table.

        Raises:
            JobError: the table has no known form, its rows are not in the order of the steps, or
                a step names an expert twice or one that its layer does not have.
        """
        form: TableForm | None = None
        waiting: list[dict[str, np.ndarray]] = []
        for batch in batches:
            form = form or TableForm.of(batch.schema, file)
            rows = form.rows_of(batch)
            cuts = np.flatnonzero(np.diff(rows["step"])) + 1
            for start, stop in zip([0, *cuts], [*cuts, batch.num_rows], strict=True):
                part = {name: column[start:stop] for name, column in rows.items()}
                if waiting and len(part["step"]) and waiting[0]["step"][0] != part["step"][0]:
                    yield self._step(waiting, file)
                    waiting = []
                if len(part["step"]):
                    waiting.append(part)
        if waiting:
            yield self._step(waiting, file)

    def _step(self, parts: list[dict[str, np.ndarray]], file: str) -> Step:
        rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        number = int(rows["step"][0])
        where = f"{file}: step {number}"
        counts = self._of_lists(rows, where) if "counts" in rows else self._of_rows(rows, where)
        numbers = {name: _one(rows[name], name, where) for name in NUMBERS if name in rows}
        return Step(number, counts, numbers)

    def _of_lists(self, rows: dict[str, np.ndarray], where: str) -> dict[int, np.ndarray]:
        layers = rows["layer"].tolist()
        sizes = {len(counts_E) for counts_E in rows["counts"] if counts_E is not None}
        if self.num_experts is not None and sizes != {self.num_experts}:
            raise JobError(
                f"{where} has {sorted(sizes)} experts a layer, not those of --num-experts"
            )
        if len(set(layers)) < len(layers):
            twice = next(layer for layer in layers if layers.count(layer) > 1)
            raise JobError(f"{where} has layer {twice} twice: sort the rows by step, keep one each")
        return dict(zip(layers, map(np.asarray, rows["counts"]), strict=True))

    def _of_rows(self, rows: dict[str, np.ndarray], where: str) -> dict[int, np.ndarray]:
        """Collect the rows of each expert; one without a row got no token."""
        layers, place = np.unique(rows["layer"], return_inverse=True)
        experts, tokens = rows["expert"], rows["tokens"]
        if self._sizes is None:
            self._sizes = self._sizes_of(layers, place, experts)
        sizes = np.array([self._sizes.get(int(layer), 0) for layer in layers])
        for layer in set(layers.tolist()) - self._sizes.keys():
            raise JobError(f"{where} has layer {layer}, and the first step has not")
        if (beyond := np.flatnonzero(experts >= sizes[place])).size:
            layer, expert = layers[place[beyond[0]]], experts[beyond[0]]
            raise JobError(
                f"{where} has expert {expert} of layer {layer}, which the first step and "
                "--num-experts do not have: set --num-experts to the number of experts of a layer"
            )
        counts_ME = np.zeros((len(layers), sizes.max()))
        seen_ME = np.zeros(counts_ME.shape, np.int64)
        np.add.at(counts_ME, (place, experts), tokens)
        np.add.at(seen_ME, (place, experts), 1)
        if (seen_ME > 1).any():
            row, expert = np.argwhere(seen_ME > 1)[0]
            raise JobError(
                f"{where} has expert {expert} of layer {layers[row]} twice: sort the rows by step, "
                "and sum those of several ranks"
            )
        return {int(layer): counts_ME[i, : sizes[i]] for i, layer in enumerate(layers)}

    def _sizes_of(
        self, layers: np.ndarray, place: np.ndarray, experts: np.ndarray
    ) -> dict[int, int]:
        """Return the number of experts of each layer, from the rows of the first step."""
        largest = np.zeros(len(layers), np.int64)
        np.maximum.at(largest, place, experts + 1)
        if self.num_experts is not None:
            largest[:] = self.num_experts
        elif experts.min() > 0:
            raise JobError(
                "no layer has an expert 0: number experts from 0, or set --num-experts if expert 0 "
                "got no token"
            )
        elif (largest != np.bincount(place)).any():  # experts without tokens have no rows
            largest[:] = largest.max()
        return dict(zip(layers.tolist(), largest.tolist(), strict=True))


def _one(values: np.ndarray, name: str, where: str) -> float:
    """Return the number of a step, which only some of its rows may have; NaN if none has."""
    found = np.unique(values[np.isfinite(values)])
    if len(found) > 1:
        raise JobError(f"{where} has more than one {name}: keep one")
    return float(found[0]) if len(found) else np.nan
