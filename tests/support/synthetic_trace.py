"""Synthetic traces: Dirichlet loads that drift, sampled, with slow balancing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from titan_moe_lb.traces.balance_statistics import max_violation
from titan_moe_lb.traces.columns import Column
from titan_moe_lb.traces.run_info import RunInfo
from titan_moe_lb.traces.step_load import StepLoad
from titan_moe_lb.traces.trace import FILE_NAME, TraceWriter, read_trace

LOSS = "seq_load_balancing_loss"
COLUMNS = (
    Column("avg_overload_factor"),
    Column("max_overload_factor", summary="max"),
    Column("micro_batch_max_violation"),
    Column("bias_range", summary="max", description="Largest bias minus the smallest."),
    Column("max_cum_overload_factor", per="step"),
    Column("loss", per="step"),
    Column("grad_norm", per="step"),
    Column("tokens_per_second", per="step"),
    Column("step_seconds", per="step"),
)


def run_info(num_layers: int = 4, num_experts: int = 8, top_k: int = 2, **changes) -> RunInfo:
    fields = {
        "model": "deepseek_v3",
        "flavor": "debugmodel",
        "num_experts": num_experts,
        "top_k": top_k,
        "layers": tuple(range(1, num_layers + 1)),
        "losses": {LOSS: 1e-4},
        "world_size": 4,
        "pp": 2,
        "dp_replicate": 1,
        "dp_shard": 2,
        "cp": 1,
        "tp": 1,
        "ep": 2,
        "schedule": "Interleaved1F1B",
        "local_batch_size": 4,
        "global_batch_size": 8,
        "micro_batch_size": 1,
        "seq_len": 256,
        "expert_bias": "sign (speed 0.001)",
        "started": "2026-01-02T03:04:05+00:00",
        "version": "0.1.0",
    }
    fields |= changes
    losses = tuple(Column(name, is_aux_loss=True) for name in fields["losses"])
    return RunInfo(**{"columns": (*losses, *COLUMNS), **fields})


def step_loads(
    info: RunInfo, num_steps: int, seed: int = 0, skew: float = 1.0
) -> Iterator[StepLoad]:
    """Make the loads of ``num_steps`` steps: uneven at first, then half as uneven, with noise.

    Args:
        info: shapes and the number of routed tokens.
        num_steps: number of steps of the run.
        seed: seed of all random numbers.
        skew: unevenness of the start; 0 leaves only sampling noise.
    """
    random = np.random.default_rng(seed)
    num_layers, num_experts = len(info.layers), info.num_experts
    routed = info.global_batch_size * info.seq_len * info.top_k
    preference_ME = np.log(random.dirichlet(np.full(num_experts, 2.0), num_layers))
    preference_ME -= preference_ME.mean(axis=1, keepdims=True)
    for step in range(num_steps):
        preference_ME = 0.995 * preference_ME + 0.04 * random.standard_normal(preference_ME.shape)
        strength = skew * (0.4 + 0.6 * np.exp(-4 * step / num_steps))
        weights_ME = np.exp(strength * preference_ME)
        shares_ME = weights_ME / weights_ME.sum(axis=1, keepdims=True)
        counts_ME = np.stack([random.multinomial(routed, shares) for shares in shares_ME])
        violation_M = max_violation(counts_ME)
        overload_M = 1 + violation_M / 3
        tokens_per_second = 1000.0 + 20 * random.standard_normal()
        tokens = info.global_batch_size * info.seq_len
        yield StepLoad(
            layers=info.layers,
            counts_ME=counts_ME,
            layer_columns={
                name: 1 + violation_M**2 / 20 + 0.01 * random.random(num_layers)
                for name in info.losses
            }
            | {
                "avg_overload_factor": overload_M,
                "max_overload_factor": overload_M * (1 + 0.3 * random.random(num_layers)),
                "micro_batch_max_violation": violation_M * 1.2 + 0.05,
                "bias_range": 0.002 * (1 + step) ** 0.5 * (1 + random.random(num_layers)),
            },
            step_columns={
                "max_cum_overload_factor": float(overload_M.mean()),
                "loss": 2.5 + 8.5 * (1 + step) ** -0.4 + 0.03 * random.standard_normal(),
                "grad_norm": 0.5 + (1 + step) ** -0.5 + 0.05 * random.random(),
                "tokens_per_second": tokens_per_second,
                "step_seconds": tokens / (tokens_per_second * info.world_size),
            },
        )


def write_run(
    folder: Path, info: RunInfo, num_steps: int, seed: int = 0, skew: float = 1.0, every: int = 1
) -> Path:
    """Write the trace of a run that logs every ``every`` steps, and return its folder."""
    writer = TraceWriter(folder, info)
    for index, load in enumerate(step_loads(info, num_steps, seed, skew)):
        writer.write(1 + index * every, load)
    writer.close()
    return folder


def rewritten(folder: Path, counts_SME: np.ndarray) -> Path:
    """Rewrite the run in ``folder`` with other counts."""
    trace = read_trace(folder)
    writer = TraceWriter(folder / "other", trace.info)
    for index, counts_ME in enumerate(counts_SME):
        load = dataclasses.replace(trace.load(index), counts_ME=counts_ME)
        writer.write(index + 1, load)
    writer.close()
    return folder / "other"


def file_of(folder, info, num_steps):
    """Write a trace; return it, its bytes, and the end of the schema and of each step."""
    writer, file, ends = TraceWriter(folder, info), folder / FILE_NAME, []
    for step, load in enumerate(step_loads(info, num_steps), start=1):
        writer.write(step, load)
        ends.append(file.stat().st_size)
    with pa.OSFile(str(file)) as stream:
        pa.ipc.read_schema(stream)
        return file, file.read_bytes(), [stream.tell(), *ends]


def without_checksums(file, change=lambda table: None):
    """Read a trace's batches without their checksums, and change the description of its run."""
    reader = pa.ipc.open_stream(file.read_bytes())
    description = json.loads(reader.schema.metadata[b"titan_moe_lb"])
    change(description)
    metadata = {b"titan_moe_lb": json.dumps(description).encode()}
    batches = [batch.replace_schema_metadata(metadata) for batch in reader]
    return batches, metadata


def rewrite(file, batches):
    """Rewrite the trace with pyarrow, which ends a stream with a marker."""
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_stream(file, batches[0].schema, options=options) as writer:
        for batch in batches:
            writer.write_batch(batch)


def loads_by_step(info, num_steps):
    """Return the loads of steps 1 to ``num_steps``, by step."""
    return dict(enumerate(step_loads(info, num_steps), start=1))
