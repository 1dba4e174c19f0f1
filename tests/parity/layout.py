"""Parallel layout as text: ``pp=2,schedule=1F1B,dp_shard=2,microbatch=1,ac=full``."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass

from torchtitan.config import ParallelismConfig
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
from torchtitan.trainer import Trainer

CHECKPOINTING = {"none": None, "full": FullAC.Config, "selective": SelectiveAC.Config}


@dataclass(frozen=True)
class Layout:
    """Layout of one global batch; degrees of 1 are off."""

    pp: int = 1
    schedule: str = "1F1B"
    dp_shard: int = 1
    dp_replicate: int = 1
    tp: int = 1
    cp: int = 1
    ep: int = 1
    microbatch: int = 1
    accumulate: int = 1
    ac: str = "none"
    compile: bool = False
    backend: str = "inductor"
    spmd_backend: str = "spmd_types"
    sequence_parallel: bool = True
    length: int = 0
    """Tokens of a sequence; 0: a block of attention for each rank of context parallelism."""

    def __str__(self) -> str:
        """Format the differences from one process, as :func:`parse` reads them."""
        words = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                text = str(value).lower() if isinstance(value, bool) else value
                words.append(f"{field.name}={text}")
        return ",".join(words)

    @property
    def num_ranks(self) -> int:
        return self.pp * self.dp_shard * self.dp_replicate * self.tp * self.cp

    @property
    def dp(self) -> int:
        return self.dp_shard * self.dp_replicate

    @property
    def sequence_length(self) -> int:
        return self.length or 128 * self.cp

    def apply(self, config: Trainer.Config, *, global_batch_size: int) -> None:
        """Cut ``global_batch_size`` sequences this way, in place."""
        config.training.global_batch_size = global_batch_size
        config.training.local_batch_size = global_batch_size // (self.dp * self.accumulate)
        config.parallelism = ParallelismConfig(
            data_parallel_replicate_degree=self.dp_replicate,
            data_parallel_shard_degree=self.dp_shard,
            tensor_parallel_degree=self.tp,
            enable_sequence_parallel=self.sequence_parallel,
            context_parallel_degree=self.cp,
            pipeline_parallel_degree=self.pp,
            pipeline_parallel_schedule=self.schedule,
            pipeline_parallel_microbatch_size=self.microbatch,
            expert_parallel_degree=self.ep,
            spmd_backend=self.spmd_backend,
        )
        checkpointing = CHECKPOINTING[self.ac]
        config.activation_checkpoint = checkpointing() if checkpointing else None
        config.compile.enable = self.compile
        config.compile.components = ["model"]
        config.compile.backend = self.backend


def parse(text: str) -> Layout:
    """Read a layout. Raises ``ValueError`` naming the key that does not fit."""
    fields = {field.name: field for field in dataclasses.fields(Layout)}
    values = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, _, value = item.partition("=")
        if key not in fields:
            nearest = difflib.get_close_matches(key, fields, n=1, cutoff=0.0)[0]
            raise ValueError(f"layout has no key {key!r}; did you mean {nearest!r}?")
        default = fields[key].default
        if isinstance(default, bool):
            values[key] = {"true": True, "false": False, "": True}[value.lower()]
        elif isinstance(default, int):
            values[key] = int(value)
        else:
            values[key] = value
    layout = Layout(**values)
    if layout.ac not in CHECKPOINTING:
        raise ValueError(f"layout ac={layout.ac!r}; valid: {', '.join(CHECKPOINTING)}")
    return layout
