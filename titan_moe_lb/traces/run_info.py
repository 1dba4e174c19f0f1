"""Description of a run, stored in the metadata of its traces."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pyarrow as pa
from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from titan_moe_lb.errors import JobError
from titan_moe_lb.traces.columns import Column

FORMAT_VERSION = 3
_KEY = b"titan_moe_lb"
_DEGREES = ("world_size", "pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")
_SIZES = (
    "top_k",
    "local_batch_size",
    "global_batch_size",
    "micro_batch_size",
    "seq_len",
    *_DEGREES,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """Description of the run of a trace: JSON in the metadata of the file's Arrow schema."""

    model: str
    flavor: str
    num_experts: int
    """Experts of a layer; the largest number if layers differ."""
    top_k: int
    """Experts that a token chooses; the largest number if layers differ."""
    layers: tuple[int, ...]
    """Numbers of the MoE layers in the whole model, ascending."""
    num_experts_by_layer: tuple[int, ...] | None = None
    """Experts of each of ``layers``; None if all have ``num_experts``."""
    top_k_by_layer: tuple[int, ...] | None = None
    """top_k of each of ``layers``; None if all have ``top_k``."""
    losses: dict[str, float] = field(default_factory=dict)
    """Metric name of each aux loss to its weight."""
    columns: tuple[Column, ...] = ()
    """Declared columns of the trace."""
    world_size: int
    pp: int
    dp_replicate: int
    dp_shard: int
    cp: int
    tp: int
    ep: int
    schedule: str | None
    """Pipeline schedule; None without pipeline parallelism."""
    local_batch_size: int
    """Sequences of one data-parallel rank in one forward and backward pass."""
    global_batch_size: int
    """Sequences of one optimizer step: the resolved number, never -1."""
    micro_batch_size: int
    """Sequences of one forward of a pipeline stage; local_batch_size without a pipeline."""
    seq_len: int
    """Tokens of one sequence."""
    forced_routing: str | None = None
    """Forced routing strategy of a benchmark; None if the router chooses."""
    routing: str | None = None
    """Anticipatory routing and its delay; None if each forward chooses its experts."""
    expert_bias: str | None = None
    """Rules of the expert bias and their settings, joined by ``"; "``; None without a bias."""
    frozen: dict[str, list[int]] = field(default_factory=dict)
    """Layers whose ``gate``, ``bias`` or ``losses`` do not learn, by part."""
    score_func: str | None = None
    """Function from the gate's logits to scores; None if it is not known."""
    expert_groups: tuple[int, ...] | None = None
    """Numbers of expert groups of group-limited routing and losses, coarse to fine; None if
    they are not known."""
    placement: str | None = None
    """Title of the placement that numbers the experts; None for the original numbers."""
    is_foreign: bool = False
    """True if another framework made the run: its balancing is not known."""
    started: str
    """ISO 8601 time with offset."""
    version: str
    """Version of titan_moe_lb."""
    learning_rate: float | None = None
    """Learning rate of the first group of parameters, before its schedule; None if unknown."""
    seed: int | None = None
    """Seed of the job; None if it has none, or is unknown."""
    resumed_at: tuple[int, ...] = ()
    """First step of each resumed run that continued this trace; the writer fills it in."""
    balanced_since: int | None = None
    """First step with these losses, bias rules, frozen parts, scores and routing, where a resumed
    run changed them; None: the first of the trace. The writer fills it in."""
    format_version: int = FORMAT_VERSION

    @property
    def title(self) -> str:
        """Model and flavor."""
        return f"{self.model} {self.flavor}".strip()

    @property
    def model_name(self) -> str:
        """Model, flavor and shape of the MoE layers, as a phrase for messages."""
        experts, top_k = _range(self.num_experts_M), _range(self.top_k_M)
        return f"{self.title} ({len(self.layers)} MoE layers, {experts} experts, top {top_k})"

    @property
    def num_experts_M(self) -> np.ndarray:
        """Number of experts of each layer, integers ``(M,)``."""
        return np.array(self.num_experts_by_layer or [self.num_experts] * len(self.layers))

    @property
    def top_k_M(self) -> np.ndarray:
        """top_k of each layer, integers ``(M,)``."""
        return np.array(self.top_k_by_layer or [self.top_k] * len(self.layers))

    def top_k_of(self, layer: int) -> int:
        """Return the top_k of one of ``layers``."""
        return int(self.top_k_M[self.layers.index(layer)])

    @property
    def layout(self) -> str:
        """Parallel layout as a phrase: number of ranks, every degree above 1, schedule."""
        names = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")
        degrees = [f"{name} {getattr(self, name)}" for name in names if getattr(self, name) > 1]
        ranks = f"{self.world_size} rank" + ("s" if self.world_size > 1 else "")
        schedule = [self.schedule] if self.schedule and self.pp > 1 else []
        return ", ".join([ranks, *degrees, *schedule])

    def require_same_model(self, other: RunInfo, here: str, there: str) -> None:
        """Raise unless both runs agree in model, flavor, experts, top_k and MoE layers.

        Args:
            other: the other run.
            here: name of this run in the message, for example its folder.
            there: name of the other run in the message.

        Raises:
            JobError: the models differ.
        """
        of_layers = ("layers", "num_experts_by_layer", "top_k_by_layer")
        names = ("model", "flavor", "num_experts", "top_k", *of_layers)
        if any(getattr(self, name) != getattr(other, name) for name in names):
            raise JobError(
                f"{here} is of {self.model_name}, {there} is of {other.model_name}: "
                "take two runs of one model"
            )

    def balances_like(self, other: RunInfo) -> bool:
        """Return True if both runs balance alike: same losses, bias rules, scores, frozen parts."""
        names = ("losses", "expert_bias", "frozen", "score_func", "forced_routing", "routing")
        return all(getattr(self, name) == getattr(other, name) for name in names)

    def metadata(self) -> dict[bytes, bytes]:
        """Return the metadata for the schema of a trace file."""
        return {_KEY: json.dumps(dataclasses.asdict(self)).encode()}

    @classmethod
    def of_schema(cls, schema: pa.Schema, path: Path) -> RunInfo:
        """Read the description from the schema of a trace file.

        Args:
            schema: schema of the file.
            path: the file, for messages.

        Raises:
            JobError: the file is no trace of titan_moe_lb, is damaged, or has another format.
        """
        text = (schema.metadata or {}).get(_KEY)
        if text is None:
            raise JobError(
                f"{path} is an Arrow stream but not a trace of titan_moe_lb: name the folder of a run"
            )
        try:
            return cls(**_fields(json.loads(text), path))
        except JobError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, TypeCheckError) as error:
            raise JobError(
                f"{path} describes its run in a way that cannot be read "
                f"({str(error).partition(chr(10))[0]}): it is damaged, use another run"
            ) from error


def _fields(table: dict[str, Any], path: Path) -> dict[str, Any]:
    """Convert the JSON of the metadata to the fields of RunInfo.

    Raises:
        JobError: another version of titan_moe_lb wrote it, in another format.
        ValueError: a number is out of range, or numbers contradict each other.
    """
    if (version := table["format_version"]) != FORMAT_VERSION:
        raise JobError(
            f"{path} has trace format {version}, this titan_moe_lb reads format {FORMAT_VERSION}: "
            "read it with the version that wrote it"
        )
    table["columns"] = tuple(Column(**_known(Column, one)) for one in table["columns"])
    table["layers"] = tuple(table["layers"])
    table["resumed_at"] = tuple(table["resumed_at"])
    for name in ("expert_groups", "num_experts_by_layer", "top_k_by_layer"):
        if table.get(name) is not None:
            table[name] = tuple(table[name])
    for name in ("num_experts", "top_k"):
        of_layers = table.get(f"{name}_by_layer")
        if of_layers and (
            len(of_layers) != len(table["layers"])
            or min(of_layers) < 1
            or max(of_layers) != table[name]
        ):
            raise ValueError(f"{name}_by_layer is not of its layers")
    numbers = (table["num_experts"] - 1, *table["layers"])
    if len(numbers) == 1 or not all(0 <= number < 2**31 for number in numbers):
        raise ValueError("it has no layers or no experts")
    if not all(0 < table[name] < 2**31 for name in _SIZES):
        raise ValueError("a batch size or a parallel degree is not one")
    return _known(RunInfo, table)


def _known(kind: type, table: dict[str, Any]) -> dict[str, Any]:
    """Select the fields of a dataclass from a table, and check their types."""
    every = CollectionCheckStrategy.ALL_ITEMS
    return {
        name: check_type(table[name], hint, collection_check_strategy=every)
        for name, hint in get_type_hints(kind).items()
        if name in table
    }


def _range(numbers: np.ndarray) -> str:
    low, high = numbers.min(), numbers.max()
    return f"{low}" if low == high else f"{low} to {high}"
