"""Forms of a table of loads: which column is the step, the layer, the expert, the tokens.

* long: one row for each step, layer and expert;
* wide: one row for each step and layer, one column for each expert, such as ``expert_0``;
* lists: one row for each step and layer, and the tokens of its experts in a list.

Shape suffixes: R = rows, E = experts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from titan_moe_lb.errors import JobError

NAMES = {
    "step": ("step", "iteration", "iter", "global_step"),
    "layer": ("layer", "layer_id", "layer_idx", "layer_number"),
    "expert": ("expert", "expert_id", "expert_idx"),
    "tokens": ("tokens", "count", "counts", "num_tokens", "tokens_per_expert"),
}
"""Names that a column may have, in lower case."""
PREFIXES = ("", "e", "expert", "experts", "tokens", "tokens_per_expert")
"""Words before the number of an expert, in the name of its column."""
NUMBERS = ("loss", "grad_norm", "step_seconds", "tokens_per_second")
"""Further columns that are kept, one number for each step."""


_LARGEST = 2**31
"""Bound of the numbers of steps, layers and experts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableForm:
    """Columns of a table, by the table's own names."""

    file: str
    """File of the table, for messages."""
    step: str
    layer: str
    expert: str | None
    """Column of the expert; None without one row for each expert."""
    tokens: str | None
    """Column of the tokens, or of lists of them; None in the wide form."""
    experts: tuple[str, ...]
    """Columns of the wide form, expert 0 first."""
    numbers: dict[str, str]
    """Name in the trace to the column."""

    @classmethod
    def of(cls, schema: pa.Schema, file: str) -> TableForm:
        """Recognise the form by the names of the columns.

        Raises:
            JobError: a column is missing, or has no meaning.
        """
        if len({name.strip().lower() for name in schema.names}) < len(schema.names):
            raise JobError(f"{file} has a column twice: {', '.join(schema.names)}")
        lower = {name.strip().lower().replace(" ", "_"): name for name in schema.names}
        known = {
            role: next((lower.pop(name) for name in names if name in lower), None)
            for role, names in NAMES.items()
        }
        numbers = {name: lower.pop(name) for name in NUMBERS if name in lower}
        experts = _numbered(lower)
        for name in experts:
            lower.pop(name.strip().lower().replace(" ", "_"))
        for role in ("step", "layer"):
            if known[role] is None:
                raise JobError(f"{file} has no column {role}: name one of its columns {role}")
        if known["tokens"] is None and (known["expert"] is not None or not experts):
            raise JobError(
                f"{file} has no tokens: give it a column tokens, with one row for each expert, or "
                "a column for each expert, expert_0, expert_1 and so on"
            )
        if known["tokens"] is not None and known["expert"] is None:
            kind = schema.field(known["tokens"]).type
            if not (pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind)):
                raise JobError(
                    f"{file} has no column expert: name the column of the experts' numbers so"
                )
        lower.update({name: name for name in experts if known["tokens"] is not None})
        if lower:
            raise JobError(
                f"{file} has a column {next(iter(lower.values()))!r}, which has no meaning here: "
                f"remove it; those of a step are {', '.join(NUMBERS)}"
            )
        assert known["step"] is not None and known["layer"] is not None
        return cls(
            file=file,
            step=known["step"],
            layer=known["layer"],
            expert=known["expert"],
            tokens=known["tokens"],
            experts=experts,
            numbers=numbers,
        )

    def rows_of(self, batch: pa.RecordBatch) -> dict[str, np.ndarray]:
        """Convert a batch to arrays ``(R,)`` by role; ``counts`` is a list of R arrays.

        Raises:
            JobError: a column has a value that is no number.
        """
        rows = {
            "step": self._numbers(batch, self.step, whole=True),
            "layer": self._numbers(batch, self.layer, whole=True),
            **{name: self._numbers(batch, column) for name, column in self.numbers.items()},
        }
        if self.expert is not None:
            assert self.tokens is not None
            rows["expert"] = self._numbers(batch, self.expert, whole=True)
            rows["tokens"] = self._numbers(batch, self.tokens)
        elif self.tokens is not None:
            rows["counts"] = _objects(batch[self.tokens].to_pylist())
        else:
            counts_RE = np.column_stack([self._numbers(batch, name) for name in self.experts])
            # A layer with fewer experts leaves its last columns empty.
            size_R = counts_RE.shape[1] - np.isnan(counts_RE[:, ::-1]).argmin(axis=1)
            rows["counts"] = _objects(
                [row[:size] for row, size in zip(counts_RE, size_R, strict=True)]
            )
        return rows

    def _numbers(self, batch: pa.RecordBatch, name: str, *, whole: bool = False) -> np.ndarray:
        """Convert a column to float64 ``(R,)``, NaN where it is empty, or to int64 if ``whole``."""
        try:
            values = np.asarray(batch[name].to_numpy(zero_copy_only=False), np.float64)
        except (TypeError, ValueError):
            raise JobError(
                f"{self.file}: column {name!r} has values that are no numbers: correct them"
            ) from None
        if not whole:
            return values
        if not ((values == np.round(values)) & (values >= 0) & (values < _LARGEST)).all():
            raise JobError(
                f"{self.file}: column {name!r} has values that are no whole numbers from 0: "
                "correct them"
            )
        return values.astype(np.int64)


def _numbered(names: dict[str, str]) -> tuple[str, ...]:
    """Find columns that are numbered from 0 without a gap, in the order of their numbers."""
    found = [(re.fullmatch(r"(.*?)_?(\d+)", name), column) for name, column in names.items()]
    numbered = {int(match[2]): column for match, column in found if match}
    prefixes = {match[1] for match, _column in found if match}
    if not prefixes or prefixes - set(PREFIXES) or sorted(numbered) != [*range(len(numbered))]:
        return ()
    return tuple(numbered[number] for number in range(len(numbered)))


def _objects(rows: list) -> np.ndarray:
    made = np.empty(len(rows), dtype=object)
    made[:] = rows
    return made
