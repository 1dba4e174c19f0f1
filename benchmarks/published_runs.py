"""The cost model beside runs that others have published: step times, at the default assumptions.

    OMP_NUM_THREADS=1 python -m benchmarks.published_runs [--only NAME ...]

Each run is planned as ``titan-moe-lb plan`` does it, at balance: all of them were measured with
balanced routing, or trained with little imbalance. Nothing is fitted to a run. Prints the rows
of the table in docs/planning.md.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import tomli_w
import tyro

from titan_moe_lb.costmodel.hardware import FIGURES
from titan_moe_lb.costmodel.known_hardware import hardware
from titan_moe_lb.plan.command import make_plan
from titan_moe_lb.plan.question import Question

AUTOMODEL = "NeMo AutoModel performance summary of 2025-10-02"
MODEL_ZOO = "github.com/yanring/Megatron-MoE-ModelZoo, best_practice/Qwen3"
REPORT = "arXiv 2412.19437, table 1"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A published run, and the job that comes nearest to it."""

    name: str
    source: str
    hardware: str
    ranks: int
    ep: int
    tokens_per_second: float
    """Of one GPU."""
    job: tuple[str, ...]
    differs: str = ""
    """What the job does not say of the run."""
    what_if: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    """Other predictions: what they take from that, and factors on figures of the device."""


def _job(module: str, flavor: str, local: int, batch: int, ac: str, *more: str) -> tuple[str, ...]:
    return (
        f"--module={module}",
        f"--config={module}_{flavor}",
        "--training.seq_len=4096",
        "--model.aux_losses=[]",
        f"--training.local_batch_size={local}",
        f"--training.global_batch_size={batch}",
        *more,
        f"activation-checkpoint:{ac}",
    )


NEIGHBOURS = "--debug.moe_force_load_balance"
"""AutoModel's balanced gate gives a token experts that follow one another, and so does this."""
TP2 = "--parallelism.tensor_parallel_degree=2"


HIDDEN = {
    "bf16_flops": 112 / 132,
    "scale_up_bandwidth": 1e6,
    "scale_out_bandwidth": 1e6,
    "scale_up_latency": 1e-6,
    "scale_out_latency": 1e-6,
}


def _pipeline(degree: int, layers: int) -> tuple[str, ...]:
    return (
        f"--parallelism.pipeline_parallel_degree={degree}",
        "--parallelism.pipeline_parallel_schedule=Interleaved1F1B",
        f"--parallelism.pipeline_parallel_layers_per_stage={layers}",
    )


RUNS = (
    Run(
        name="GPT-OSS 20B",
        source=AUTOMODEL,
        hardware="h100",
        ranks=8,
        ep=8,
        tokens_per_second=256 * 4096 / 10.04 / 8,
        job=_job("gpt_oss", "20b", 2, 256, "None", NEIGHBOURS),
    ),
    Run(
        name="Qwen3 30B-A3B",
        source=AUTOMODEL,
        hardware="h100",
        ranks=8,
        ep=8,
        tokens_per_second=512 * 4096 / 21.773 / 8,
        job=_job("qwen3", "30b_a3b", 4, 512, "full", NEIGHBOURS),
    ),
    Run(
        name="GPT-OSS 120B",
        source=AUTOMODEL,
        hardware="h100",
        ranks=64,
        ep=64,
        tokens_per_second=512 * 4096 / 4.30 / 64,
        job=_job("gpt_oss", "120b", 2, 512, "None", NEIGHBOURS),
    ),
    Run(
        name="DeepSeek-V3 671B, 256 GPUs",
        source=AUTOMODEL,
        hardware="h100",
        ranks=256,
        ep=64,
        tokens_per_second=512 * 4096 / 8.18 / 256,
        job=_job("deepseek_v3", "671b", 8, 512, "full", NEIGHBOURS, *_pipeline(4, 2)),
    ),
    Run(
        name="DeepSeek-V3 671B, 1,024 GPUs",
        source=AUTOMODEL,
        hardware="h100",
        ranks=1024,
        ep=64,
        tokens_per_second=8192 * 4096 / 37.87 / 1024,
        job=_job("deepseek_v3", "671b", 8, 8192, "full", NEIGHBOURS, *_pipeline(4, 2)),
        # 2.55 billion parameters of experts on a rank, each gathered in BF16 and reduced in float32
        # among four, four times a step: 4 x 2.55e9 x 3/4 x (2 + 4) bytes at 40 GB/s.
        differs="FSDP's collectives of the experts, which four EP groups share: 1.15 s if nothing hides them",
    ),
    Run(
        name="DeepSeek-V3 671B, pre-training",
        source=REPORT,
        hardware="h800",
        ranks=2048,
        ep=64,
        tokens_per_second=14.8e12 / 2.664e6 / 3600,
        job=_job("deepseek_v3", "671b", 112, 14336, "None", *_pipeline(16, 2)),
        differs="multi-token prediction, batches of 15,360",
        what_if={
            "all-to-alls hidden by DualPipe, which leaves 112 of 132 SMs (section 3.2)": HIDDEN,
            "and products in FP8 at twice the rate (section 3.3)": HIDDEN
            | {"bf16_flops": 2 * 112 / 132},
        },
    ),
    Run(
        name="Qwen3 235B-A22B, pipeline",
        source=MODEL_ZOO,
        hardware="h100",
        ranks=256,
        ep=32,
        tokens_per_second=2048 * 4096 / 19.7 / 256,
        job=_job("qwen3", "235b_a22b", 128, 2048, "None", TP2, *_pipeline(8, 3)),
        differs="norms and activations are computed again",
    ),
    Run(
        name="Qwen3 235B-A22B, FSDP",
        source=MODEL_ZOO,
        hardware="h100",
        ranks=256,
        ep=8,
        tokens_per_second=2048 * 4096 / 17.6 / 256,
        job=_job("qwen3", "235b_a22b", 4, 2048, "full", TP2),
    ),
)


@dataclass
class Arguments:
    only: tuple[str, ...] = ()
    """Names of runs, or parts of them."""


def main() -> None:
    arguments = tyro.cli(Arguments)
    print("| run | GPUs | EP | measured | predicted | deviation | not in the job | source |")
    print("|---|---|---|---|---|---|---|---|")
    for run in RUNS:
        if arguments.only and not any(part in run.name for part in arguments.only):
            continue
        tokens, predicted = _predict(run, run.hardware)
        measured = tokens / run.tokens_per_second / run.ranks
        differs = [run.differs] if run.differs else []
        for name, factors in run.what_if.items():
            with tempfile.TemporaryDirectory() as folder:
                _tokens, changed = _predict(run, _changed(run.hardware, factors, folder))
            differs.append(f"{name}: {changed:.2f} s, {changed / measured - 1:+.0%}")
        print(
            f"| {run.name} | {run.ranks:,} | {run.ep} | {measured:.2f} s | {predicted:.2f} s "
            f"| {predicted / measured - 1:+.0%} | {'; '.join(differs)} | {run.source} |",
            flush=True,
        )


def _predict(run: Run, device: str) -> tuple[int, float]:
    """Tokens of a step, and its seconds at balance."""
    plan = make_plan(
        Question(
            hardware=device,
            ranks=run.ranks,
            ep=str(run.ep),
            imbalance="1.0",
            dispatcher="deepep",
            job_flags=run.job,
        )
    )
    return plan.job.tokens_per_step, plan.degrees[0].balance.step_seconds


def _changed(name: str, factors: Mapping[str, float], folder: str) -> str:
    """A file in the folder with a device some of whose figures are others."""
    device = hardware(name)
    figures = {name: getattr(device, name) * factors.get(name, 1) for name in FIGURES}
    figures["scale_up_domain"] = device.scale_up_domain
    file = Path(folder) / "device.toml"
    file.write_text(tomli_w.dumps(figures))
    return str(file)


if __name__ == "__main__":
    main()
