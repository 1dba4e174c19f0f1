"""Writer of a trace for the loads of any framework. Needs neither torch nor torchtitan."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from titan_moe_lb.errors import JobError
from titan_moe_lb.traces.balance_statistics import ABSENT
from titan_moe_lb.traces.columns import Column
from titan_moe_lb.traces.run_info import RunInfo
from titan_moe_lb.traces.step_load import StepLoad
from titan_moe_lb.traces.trace import TraceWriter, trace_file
from titan_moe_lb.version import __version__


class LoadTrace:
    """Trace of the tokens per expert of a run, written step by step.

    ``titan-moe-lb report``, ``watch``, ``diagnose`` and ``plan --from-run`` read it like the trace
    of a job. Use it as a context manager, or call :meth:`close`.

    Example:
        with LoadTrace("runs/mine", top_k=8, ep=8) as trace:
            trace.write(step, {layer: tokens_of_each_expert, ...}, loss=2.5)
    """

    def __init__(
        self,
        run_dir: Path | str,
        *,
        top_k: int,
        ep: int = 1,
        micro_batches: int = 1,
        model: str = "model",
        drops_tokens: bool = False,
    ) -> None:
        """Prepare the trace; the first :meth:`write` makes its file.

        Args:
            run_dir: folder of the run. A trace that it has is continued, or renamed, as by a job
                that resumes.
            top_k: experts that a token chooses.
            ep: expert-parallel degree of the run.
            micro_batches: forwards of one rank in a step, times the data-parallel degree.
            model: name of the model.
            drops_tokens: True if counts leave out tokens over a capacity.

        Raises:
            JobError: an argument is below 1.
        """
        for name, value in {"top_k": top_k, "ep": ep, "micro_batches": micro_batches}.items():
            if value < 1:
                raise JobError(f"{name} is {value}: give a number from 1")
        self.path = trace_file(run_dir)
        self._top_k, self._ep, self._micro_batches = top_k, ep, micro_batches
        self._model, self._drops_tokens = model, drops_tokens
        self._writer: TraceWriter | None = None
        self._info: RunInfo | None = None
        self._step: int | None = None

    def write(
        self,
        step: int,
        counts: Mapping[int, Sequence[int] | np.ndarray],
        **numbers: float | Sequence[float] | np.ndarray,
    ) -> None:
        """Append a step. A full disk is logged once, and raises nothing.

        Args:
            step: number of the optimizer step, larger than the last one.
            counts: number of each MoE layer to the tokens of each of its experts over the global
                batch. A layer sums to top_k x tokens.
            **numbers: further numbers by name: one for the step, or one for each layer, in
                ascending order of the layers. ``loss``, ``grad_norm``, ``step_seconds`` and
                ``tokens_per_second`` (per device) have places in the report.

        Raises:
            JobError: counts are not of the layers, experts or numbers of the first step, are no
                whole numbers from 0, have no tokens, or do not sum to the same multiple of top_k;
                or the step is not larger than the last.
        """
        if not any(np.any(counts_E) for counts_E in counts.values()):
            raise JobError(f"step {step} has no tokens: leave it out")
        layers = tuple(sorted(counts))
        rows = [_whole_numbers(counts[layer], step, layer) for layer in layers]
        values = {name: np.asarray(value, np.float64) for name, value in numbers.items()}
        if self._info is None:
            self._info = self._described(layers, rows, values)
            self._writer = TraceWriter(self.path, self._info)
        assert self._writer is not None
        self._check(step, layers, rows, values)
        counts_ME = np.full((len(rows), self._info.num_experts), ABSENT, np.int64)
        for row, counts_E in enumerate(rows):
            counts_ME[row, : len(counts_E)] = counts_E
        self._writer.write(
            step,
            StepLoad(
                layers=layers,
                counts_ME=counts_ME,
                layer_columns={name: value for name, value in values.items() if value.ndim},
                step_columns={n: float(value) for n, value in values.items() if not value.ndim},
            ),
        )
        self._step = step

    def close(self) -> None:
        """Mark the end of the trace."""
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> LoadTrace:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _described(
        self, layers: tuple[int, ...], rows: list[np.ndarray], values: dict[str, np.ndarray]
    ) -> RunInfo:
        sizes = [len(counts_E) for counts_E in rows]
        return RunInfo(
            model=self._model,
            flavor="",
            num_experts=max(sizes),
            num_experts_by_layer=None if len(set(sizes)) == 1 else tuple(sizes),
            top_k=self._top_k,
            layers=layers,
            columns=tuple(
                Column(name, "layer" if value.ndim else "step") for name, value in values.items()
            ),
            world_size=self._ep,
            pp=1,
            dp_replicate=1,
            dp_shard=self._ep,
            cp=1,
            tp=1,
            ep=self._ep,
            schedule=None,
            is_foreign=True,
            local_batch_size=1,
            global_batch_size=self._micro_batches,
            micro_batch_size=1,
            # A micro-batch counts as one sequence.
            seq_len=max(1, int(rows[0].sum()) // self._top_k // self._micro_batches),
            started=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            version=__version__,
        )

    def _check(
        self,
        step: int,
        layers: tuple[int, ...],
        rows: list[np.ndarray],
        values: dict[str, np.ndarray],
    ) -> None:
        info = self._info
        assert info is not None
        if self._step is not None and step <= self._step:
            raise JobError(f"step {step} comes after step {self._step}: write steps in their order")
        if layers != info.layers:
            raise JobError(
                f"step {step} has layers {list(layers)}, the steps before have {list(info.layers)}: "
                "write every MoE layer in every step"
            )
        for layer, counts_E, size in zip(layers, rows, info.num_experts_M, strict=True):
            if len(counts_E) != size:
                raise JobError(
                    f"layer {layer} has {len(counts_E)} experts in step {step}, and {size} before: "
                    "write a count for each of its experts in every step"
                )
            if size < self._top_k:
                raise JobError(f"top_k is {self._top_k}, and layer {layer} has {size} experts")
            if self._drops_tokens:
                continue
            if counts_E.sum() % self._top_k or counts_E.sum() != rows[0].sum():
                raise JobError(
                    f"in step {step} the counts of layer {layers[0]} sum to {rows[0].sum()}, those of "
                    f"layer {layer} to {counts_E.sum()}: every layer must have the same sum, a multiple "
                    f"of top_k {self._top_k}; if a capacity dropped tokens, say so (drops_tokens, "
                    "--drops-tokens)"
                )
        declared = {column.name: column.per for column in info.columns}
        if found := values.keys() - declared.keys():
            raise JobError(
                f"step {step} has {sorted(found)[0]!r}, and the first step did not: write the same "
                "numbers in every step, or NaN"
            )
        for name, value in values.items():
            if value.shape != ((len(layers),) if declared[name] == "layer" else ()):
                raise JobError(
                    f"{name} of step {step} has the shape {value.shape}: give one number for the "
                    "step, or one for each layer, as in the first step"
                )


def _whole_numbers(counts: Sequence[int] | np.ndarray, step: int, layer: int) -> np.ndarray:
    """Convert the counts of a layer to int64 ``(E,)``.

    Raises:
        JobError: they are no whole numbers from 0.
    """
    try:
        found = np.asarray(counts)
        with np.errstate(invalid="ignore"):  # NaN
            whole_E = found.astype(np.int64)
        right = found.ndim == 1 and len(found) and (whole_E == found).all() and (whole_E >= 0).all()
    except (TypeError, ValueError, OverflowError):
        right = False
    if not right:
        raise JobError(
            f"the counts of layer {layer} in step {step} are no whole numbers from 0: give the "
            "tokens of each of its experts"
        )
    return whole_E
