"""What a trace says about the run that wrote it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from titan_moe_lb.errors import JobError

FORMAT_VERSION = 1
_KEY = b"titan_moe_lb"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """The run of a trace; kept as JSON in the metadata of the file's Arrow schema."""

    model: str
    flavor: str
    num_experts: int
    top_k: int
    layers: tuple[int, ...]
    """Numbers of the MoE layers in the whole model, ascending."""
    losses: dict[str, float] = field(default_factory=dict)
    """Metric name of each aux loss to its weight."""
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
    """Sequences of one optimizer step, resolved: never -1."""
    micro_batch_size: int
    """Sequences of one forward of a pipeline stage; local_batch_size without pipeline."""
    seq_len: int
    """Tokens of one sequence."""
    forced_routing: str | None = None
    """The forced routing strategy of a benchmark; None for a real run."""
    expert_bias: str | None = None
    """The rule of the expert bias and its settings; None where there is no bias."""
    started: str
    """ISO 8601 time with offset."""
    version: str
    """Version of titan_moe_lb."""
    resumed_at: tuple[int, ...] = ()
    """First step of every resumption that continued this trace; filled by the writer."""
    format_version: int = FORMAT_VERSION

    @property
    def model_name(self) -> str:
        """One phrase for messages: model, flavor and the shape of its MoE layers."""
        return (
            f"{self.model} {self.flavor} ({len(self.layers)} MoE layers, "
            f"{self.num_experts} experts, top {self.top_k})"
        )

    @property
    def layout(self) -> str:
        """The parallel layout in one phrase: every degree above 1."""
        names = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")
        degrees = [f"{name} {getattr(self, name)}" for name in names if getattr(self, name) > 1]
        ranks = f"{self.world_size} rank" + ("s" if self.world_size > 1 else "")
        schedule = [self.schedule] if self.schedule and self.pp > 1 else []
        return ", ".join([ranks, *degrees, *schedule])

    def same_model(self, other: RunInfo) -> bool:
        """Both have the same model, flavor, experts, top_k and MoE layers."""
        return self._model == other._model

    def require_same_model(self, other: RunInfo, here: str, there: str) -> None:
        """Refuse to bring two models together.

        Args:
            other: the run to go with this one.
            here, there: what each is called in the message, for example its folder.

        Raises:
            JobError: one line that names both models.
        """
        if not self.same_model(other):
            raise JobError(
                f"{here} is of {self.model_name}, {there} is of {other.model_name}: "
                "take two runs of one model"
            )

    @property
    def _model(self) -> tuple:
        return (self.model, self.flavor, self.num_experts, self.top_k, self.layers)

    def metadata(self) -> dict[bytes, bytes]:
        """For the schema of a trace file."""
        return {_KEY: json.dumps(dataclasses.asdict(self)).encode()}

    @classmethod
    def of_schema(cls, schema: pa.Schema, path: Path) -> RunInfo:
        """Read it back.

        Raises:
            JobError: the file is not ours, damaged, or of a newer format.
        """
        text = (schema.metadata or {}).get(_KEY)
        if text is None:
            raise JobError(
                f"{path} is an Arrow stream but not a trace of titan_moe_lb: name the folder of a run"
            )
        try:
            table = json.loads(text)
            version = table["format_version"]
            if version > FORMAT_VERSION:
                raise JobError(
                    f"{path} has trace format {version}, this titan_moe_lb reads up to "
                    f"{FORMAT_VERSION}: update titan_moe_lb"
                )
            speed = table.pop("load_balance_coeff", None)
            if speed is not None:  # titan_moe_lb 0.1.0, which had one rule
                table["expert_bias"] = f"sign (speed {speed:g})"
            table["layers"] = tuple(table["layers"])
            table["resumed_at"] = tuple(table["resumed_at"])
            return cls(**table)
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, JobError):
                raise
            raise JobError(
                f"{path} describes its run in a way that cannot be read ({error}): it is damaged, "
                "take another run"
            ) from error
