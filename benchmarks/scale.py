"""Cost of balancing and telemetry by the number of ranks: collectives, bytes, host time, memory, trace.

    python -m benchmarks.scale [--ranks 8,64,512,2048,16384] [--repeats 20]

Takes DeepSeek-V3 671B: 58 MoE layers, 256 experts, top 8, 64 micro-batches of one row of 4,096 tokens.
Rank 0 of each layout has real process groups over peers that do not exist (torch's fake backend), and
the real record, step hook and reduction of its layers. Each collective is counted with the bytes of
its tensor. Counts are random. Times are medians on the host without network and without a GPU.

The first table has a row for each method: what the end of a step costs, and what a logged step adds.
The second one has the trace of the whole model, which rank 0 writes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
import tyro
from torch.utils._python_dispatch import TorchDispatchMode

from titan_moe_lb.upstream import cpu

if cpu.needed():
    cpu.use_host()

from torchtitan.config import ParallelismConfig
from torchtitan.distributed import ParallelDims

from model_registry.deepseek_v3 import model_registry
from tests.support.synthetic_trace import run_info, step_loads
from titan_moe_lb.balancing.expert_bias import ExpertBias
from titan_moe_lb.balancing.losses import AuxLoss
from titan_moe_lb.balancing.recording.step_record import StepRecord
from titan_moe_lb.balancing.recording.training_loop import TrainingLoop
from titan_moe_lb.balancing.step_hook import StepHook, wire
from titan_moe_lb.costmodel.jobs.rank_memory import fake_rank
from titan_moe_lb.parallel.rank_groups import RankGroups
from titan_moe_lb.telemetry.reduction import reduce_step
from titan_moe_lb.traces.trace import FILE_NAME, TraceWriter

MOE_LAYERS = 58
MICRO_BATCHES = 64
SEQ_LEN = 4096
METHODS: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "metrics alone": (None, ()),
    "sequence_wise": (None, ("sequence_wise",)),
    "global_batch": (None, ("global_batch",)),
    "z_loss": (None, ("z_loss",)),
    "sign": ("sign", ()),
    "momentum": ("momentum", ()),
    "quantile": ("quantile", ()),
    "sign, sequence_wise": ("sign", ("sequence_wise",)),
}
"""Bias rule and losses by name."""


@dataclass
class Arguments:
    """Flags of the benchmark."""

    ranks: str = "8,64,512,2048,16384"
    """Numbers of ranks."""
    repeats: int = 20
    """Steps of each measurement."""
    trace_steps: int = 32
    """Steps of each trace."""


@dataclass
class Collectives(TorchDispatchMode):
    """Count of the collectives that run under this mode, and of their bytes."""

    number: int = 0
    bytes: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        """Run an operator, and count it if it is a collective."""
        if operator.namespace in ("c10d", "_c10d_functional"):
            tensors = args[0] if isinstance(args[0], list) else [args[0]]
            self.number += 1
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return operator(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Scale:
    """Layout of the job on a number of ranks: pipeline first, then experts over up to 64 ranks."""

    ranks: int
    pp: int = field(init=False)
    data: int = field(init=False)
    ep: int = field(init=False)

    def __post_init__(self) -> None:
        pp = max(1, min(16, self.ranks // 64))
        object.__setattr__(self, "pp", pp)
        object.__setattr__(self, "data", self.ranks // pp)
        object.__setattr__(self, "ep", min(64, self.ranks // pp))

    @property
    def layers(self) -> int:
        """MoE layers of a rank."""
        return -(-MOE_LAYERS // self.pp)


def main() -> None:
    """Print both tables."""
    arguments = tyro.cli(Arguments)
    scales = [Scale(int(ranks)) for ranks in arguments.ranks.split(",")]
    print(
        "| ranks | PP x DP, EP | method | collectives a step | KiB a step | step end ms | "
        "logged: collectives | KiB | ms | record MiB |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    for scale in scales:
        for row in of_methods(scale, arguments.repeats):
            print(row, flush=True)
    print("\n| ranks | rows of a step | trace: bytes a step | 100,000 steps |\n|---|---|---|---|")
    for scale in scales:
        size = trace_bytes(scale, arguments.trace_steps)
        rows = scale.data * MICRO_BATCHES
        print(f"| {scale.ranks:,} | {rows:,} | {size:,.0f} | {size / 1e4:.1f} GB |", flush=True)


def of_methods(scale: Scale, repeats: int) -> list[str]:
    """Measure all methods on one number of ranks, and return a line of the table for each."""
    parallelism = ParallelismConfig(
        pipeline_parallel_degree=scale.pp,
        data_parallel_shard_degree=scale.data,
        expert_parallel_degree=scale.ep,
    )
    with fake_rank(0, scale.ranks):
        dims = ParallelDims.from_config(parallelism, scale.ranks)
        dims.build_mesh()
        groups = RankGroups.of(dims)
        return [_of_method(scale, name, groups, repeats) for name in METHODS]


def _of_method(scale: Scale, name: str, groups: RankGroups, repeats: int) -> str:
    rule, losses = METHODS[name]
    layers = layers_of(scale.layers, rule, losses)
    record = wire([layer.router for layer in layers], groups)
    assert record is not None
    hook = StepHook(layers, record, groups)
    end, end_seconds = _measured(record, hook.close_step, repeats)
    logged, logged_seconds = _measured(
        record, lambda: reduce_step(layers, groups), repeats, before=hook.close_step
    )
    return (
        f"| {scale.ranks:,} | {scale.pp} x {scale.data}, {scale.ep} | {name} | {end.number} | "
        f"{end.bytes / 1024:,.0f} | {1e3 * end_seconds:.1f} | {logged.number} | "
        f"{logged.bytes / 1024:,.0f} | {1e3 * logged_seconds:.1f} | {_mib(record):,.1f} |"
    )


def layers_of(number: int, rule: str | None, losses: tuple[str, ...]) -> list[Any]:
    """Build what a step end needs of MoE layers of 671B: routers with a small gate, and biases."""
    model = model_registry(
        "671B",
        expert_bias=None if rule is None else ExpertBias.kinds[rule].Config(),
        aux_losses=[AuxLoss.kinds[loss].Config(weight=1e-4) for loss in losses],
    ).model
    layers = []
    for index, layer in enumerate(model.layers[-number:]):
        config = layer.moe.router
        config.gate.in_features = 8
        config.layer = index
        config.loop = TrainingLoop(num_micro_batches=MICRO_BATCHES, announced_rows=None)
        config.bind()
        for loss in config.aux_losses:
            loss.local_batch_size = MICRO_BATCHES
        experts = config.num_experts
        layers.append(
            SimpleNamespace(
                router=config.build(),
                expert_bias_E=None if rule is None else torch.zeros(experts),
                tokens_per_expert_E=torch.zeros(experts),
            )
        )
    return layers


def _measured(
    record: StepRecord,
    run: Callable[[], object],
    repeats: int,
    before: Callable[[], object] = lambda: None,
) -> tuple[Collectives, float]:
    """Count the collectives of a run, and take the median of its seconds."""
    seconds = []
    for step in range(repeats + 1):
        record.counts_NMSE.random_(0, SEQ_LEN)
        before()
        if step == 0:
            with Collectives() as found:
                run()
            continue
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return found, statistics.median(seconds)


def _mib(record: StepRecord) -> float:
    """Memory of the tables of a record."""
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for value in vars(record).values()
        if isinstance(value, torch.Tensor)
    }
    return sum(storages.values()) / 2**20


def trace_bytes(scale: Scale, steps: int) -> float:
    """Bytes of a step in the trace of the whole model."""
    info = run_info(
        MOE_LAYERS, 256, 8, global_batch_size=scale.data * MICRO_BATCHES, seq_len=SEQ_LEN
    )
    with TemporaryDirectory(prefix="titan_moe_lb-scale-") as folder:
        file, sizes = Path(folder, FILE_NAME), []
        writer = TraceWriter(Path(folder), info)
        for number, load in enumerate(step_loads(info, steps), start=1):
            writer.write(number, load)
            sizes.append(file.stat().st_size)
        writer.close()
    return (sizes[-1] - sizes[0]) / (len(sizes) - 1)


if __name__ == "__main__":
    main()
