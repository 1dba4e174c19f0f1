"""Loss and expert load of a run on held-out domains: ``domains.arrow`` beside the trace.

Each validation is one record batch with a row for each domain and MoE layer. The columns are
``step``, ``domain``, ``loss``, ``layer`` and ``counts``. The rows of one domain repeat its
language-model loss.

Shape suffixes: V = validations, D = domains, M = MoE layers, E = experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from titan_moe_lb.errors import JobError
from titan_moe_lb.traces.batch_reader import BatchReader
from titan_moe_lb.traces.columns import count_lists
from titan_moe_lb.traces.run_info import RunInfo
from titan_moe_lb.traces.step_file import StepFile

FILE_NAME = "domains.arrow"


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainLoad:
    """Loss and expert load of one domain in one validation."""

    loss: float
    """Language-model loss, mean over the tokens; NaN on a rank without the loss."""
    counts_ME: np.ndarray
    """Tokens routed to each expert, int64 ``(M, E)``."""


class DomainTraceWriter:
    """Writer of the file, on one rank. The file is a :class:`StepFile`."""

    def __init__(self, folder: Path | str, info: RunInfo) -> None:
        self._info = info
        self._schema = pa.schema(
            {
                "step": pa.int64(),
                "domain": pa.string(),
                "loss": pa.float64(),
                "layer": pa.int32(),
                "counts": pa.list_(pa.int64(), info.num_experts),
            }.items(),
            metadata=info.metadata(),
        )
        path = Path(folder) / FILE_NAME
        self._file = StepFile(path, self._schema, self._continued, compression="zstd")

    def write(self, step: int, loads: dict[str, DomainLoad]) -> None:
        """Append one validation with all its domains."""
        layers = self._info.layers
        counts = np.concatenate([load.counts_ME for load in loads.values()])
        rows = len(loads) * len(layers)
        batch = pa.record_batch(
            [
                pa.array(np.full(rows, step, dtype=np.int64)),
                pa.array(np.repeat(list(loads), len(layers)).tolist(), pa.string()),
                pa.array(np.repeat([load.loss for load in loads.values()], len(layers))),
                pa.array(np.tile(layers, len(loads)).astype(np.int32)),
                count_lists(counts, pa.int64()),
            ],
            schema=self._schema,
        )
        self._file.write(step, batch)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _continued(self, schema: pa.Schema, first_step: int) -> pa.Schema:
        earlier = RunInfo.of_schema(schema, self._file.path)
        self._info.require_same_model(earlier, "this run", self._file.path.name)
        return self._schema


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainTrace:
    """All validations of a run."""

    steps: np.ndarray
    """Optimizer step of each validation, int64 ``(V,)``."""
    domains: tuple[str, ...]
    loss_VD: np.ndarray
    """Language-model loss, float64 ``(V, D)``."""
    counts_VDME: np.ndarray
    """Tokens routed to each expert, int64 ``(V, D, M, E)``."""


def read_domain_trace(folder: Path | str) -> DomainTrace | None:
    """Read the validations of a run on its held-out domains; None if it has none.

    Raises:
        JobError: the file is no domain trace, or its validations differ in their domains.
    """
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        return None
    reader = BatchReader(path)
    info = RunInfo.of_schema(reader.schema, path)
    batches = [batch for batch in reader.read() if batch.num_rows]
    if not batches:
        return None
    layers = len(info.layers)
    domains = batches[-1]["domain"].to_pylist()[::layers]
    if any(batch["domain"].to_pylist()[::layers] != domains for batch in batches):
        raise JobError(f"{path}: its validations are of different domains: use another run")
    shape = (len(batches), len(domains), layers)
    table = pa.Table.from_batches(batches)
    counts = table["counts"].combine_chunks().flatten().to_numpy()
    return DomainTrace(
        steps=table["step"].to_numpy().reshape(shape)[:, 0, 0],
        domains=tuple(domains),
        loss_VD=table["loss"].to_numpy().reshape(shape)[:, :, 0],
        counts_VDME=counts.reshape(*shape, info.num_experts),
    )
