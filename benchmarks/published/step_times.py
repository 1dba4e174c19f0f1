"""Published step times, compared with the plan under its default assumptions.

    OMP_NUM_THREADS=1 python -m benchmarks.published.step_times [--only NAME ...]

Each run is planned at balance. All of them had balanced routing, or little imbalance, or no expert
parallelism. No number is fitted to a run. Prints the rows of the table in
docs/evidence/published_runs.md.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import tomli_w
import tyro

from benchmarks.published.jobs import (
    DEEPSEEK_16B,
    DEEPSEEK_671B,
    NOUS,
    NOUS_9B,
    PITH_TRAIN,
    QWEN_30B,
    QWEN_30B_FSDP,
    QWEN_235B,
    job,
    pipeline,
    planned,
)
from titan_moe_lb.commands.plan.known_hardware import hardware
from titan_moe_lb.costmodel.hardware.device import SPECS
from titan_moe_lb.costmodel.times.moe_layer import Dispatcher

AUTOMODEL = "NeMo AutoModel performance summary of 2025-10-02"
MODEL_ZOO = "github.com/yanring/Megatron-MoE-ModelZoo, best_practice/Qwen3"
REPORT = "arXiv 2412.19437, table 1"
COOKBOOK = "github.com/nebius/ml-cookbook, pytorch-dsv3-mxfp8"


@dataclass(frozen=True, kw_only=True)
class Run:
    """Published run, with the job that comes closest to it."""

    name: str
    source: str
    hardware: str
    ranks: int
    ep: int
    tokens_per_second: float
    """Tokens per second of one GPU."""
    job: tuple[str, ...]
    dispatcher: Dispatcher = "deepep"
    differs: str = ""
    """Differences between the run and the job."""
    what_if: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    """Further predictions by description, each with factors on numbers of the device."""


NEIGHBOURS = "--debug.moe_force_load_balance"
"""Flag that gives a token consecutive experts, as AutoModel's balanced gate does."""
TP2 = "--parallelism.tensor_parallel_degree=2"


AT_0_3 = {"0.3 of the peak": {"bf16_flops": 0.3 / 0.5}}
"""Factors for 0.3 of the peak; the default assumption is 0.5."""
HIDDEN = {
    "bf16_flops": 112 / 132,
    "scale_up_bandwidth": 1e6,
    "scale_out_bandwidth": 1e6,
    "scale_up_latency": 1e-6,
    "scale_out_latency": 1e-6,
}


QWEN_30B_LONG = job(QWEN_30B, local=1, batch=1024, ac="None", seq_len=8192)
DEEPSEEK_671B_TP2 = job(
    DEEPSEEK_671B, NEIGHBOURS, TP2, *pipeline(2), local=64, batch=4096, ac="full", seq_len=8192
)


RUNS = (
    Run(
        name="GPT-OSS 20B",
        source=AUTOMODEL,
        hardware="h100",
        ranks=8,
        ep=8,
        tokens_per_second=256 * 4096 / 10.04 / 8,
        job=job(("gpt_oss", "gpt_oss_20b"), NEIGHBOURS, local=2, batch=256, ac="None"),
    ),
    Run(
        name="Qwen3 30B-A3B",
        source=AUTOMODEL,
        hardware="h100",
        ranks=8,
        ep=8,
        tokens_per_second=512 * 4096 / 21.773 / 8,
        job=job(QWEN_30B, NEIGHBOURS, local=4, batch=512, ac="full"),
    ),
    Run(
        name="GPT-OSS 120B",
        source=AUTOMODEL,
        hardware="h100",
        ranks=64,
        ep=64,
        tokens_per_second=512 * 4096 / 4.30 / 64,
        job=job(("gpt_oss", "gpt_oss_120b"), NEIGHBOURS, local=2, batch=512, ac="None"),
    ),
    Run(
        name="DeepSeek-V3 671B, 256 GPUs",
        source=AUTOMODEL,
        hardware="h100",
        ranks=256,
        ep=64,
        tokens_per_second=512 * 4096 / 8.18 / 256,
        job=job(DEEPSEEK_671B, NEIGHBOURS, *pipeline(4, 2), local=8, batch=512, ac="full"),
    ),
    Run(
        name="DeepSeek-V3 671B, 1,024 GPUs",
        source=AUTOMODEL,
        hardware="h100",
        ranks=1024,
        ep=64,
        tokens_per_second=8192 * 4096 / 37.87 / 1024,
        job=job(DEEPSEEK_671B, NEIGHBOURS, *pipeline(4, 2), local=8, batch=8192, ac="full"),
        # A rank holds 2.55 billion expert parameters. Four ranks gather them in BF16 and reduce
        # them in float32, four times a step: 4 x 2.55e9 x 3/4 x (2 + 4) bytes at 40 GB/s.
        differs="FSDP's collectives of the experts, which four EP groups share: 1.15 s if nothing hides them",
    ),
    Run(
        name="DeepSeek-V3 671B, pre-training",
        source=REPORT,
        hardware="h800",
        ranks=2048,
        ep=64,
        tokens_per_second=14.8e12 / 2.664e6 / 3600,
        job=job(DEEPSEEK_671B, *pipeline(16, 2), local=112, batch=14336, ac="None"),
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
        job=job(QWEN_235B, TP2, *pipeline(8, 3), local=128, batch=2048, ac="None"),
        differs="norms and activations are computed again",
    ),
    Run(
        name="Qwen3 235B-A22B, FSDP",
        source=MODEL_ZOO,
        hardware="h100",
        ranks=256,
        ep=8,
        tokens_per_second=2048 * 4096 / 17.6 / 256,
        job=job(QWEN_235B, TP2, local=4, batch=2048, ac="full"),
    ),
    Run(
        name="Qwen3 30B-A3B, torchtitan, FSDP",
        source=PITH_TRAIN,
        hardware="b200",
        ranks=8,
        ep=1,
        tokens_per_second=19_500,
        job=QWEN_30B_FSDP,
        differs="blocks are compiled",
        what_if=AT_0_3,
    ),
    Run(
        name="Qwen3 30B-A3B, PithTrain, EP 4",
        source=PITH_TRAIN,
        hardware="b200",
        ranks=8,
        ep=4,
        tokens_per_second=20_300,
        job=QWEN_30B_LONG,
        what_if=AT_0_3,
    ),
    Run(
        name="Qwen3 30B-A3B, PithTrain, EP 8",
        source=PITH_TRAIN,
        hardware="b200",
        ranks=8,
        ep=8,
        tokens_per_second=19_400,
        job=QWEN_30B_LONG,
        what_if=AT_0_3,
    ),
    Run(
        name="DeepSeek-V3 16B, torchtitan, FSDP",
        source="github.com/pytorch/torchtitan/issues/3816",
        hardware="b200",
        ranks=8,
        ep=1,
        tokens_per_second=17_500,
        job=job(DEEPSEEK_16B, local=4, batch=32, ac="selective"),
        what_if=AT_0_3,
    ),
    Run(
        name="DeepSeek-V3 of 9.5B, torchtitan",
        source=NOUS,
        hardware="b200",
        ranks=8,
        ep=8,
        tokens_per_second=16_270,
        job=NOUS_9B,
        dispatcher="standard",
        differs="balanced by their LLEP, to 1.1; nothing is compiled",
        what_if=AT_0_3,
    ),
    Run(
        name="DeepSeek-V3 671B, torchtitan",
        source=COOKBOOK,
        hardware="b200",
        ranks=256,
        ep=32,
        tokens_per_second=651,
        job=DEEPSEEK_671B_TP2,
        dispatcher="standard",
    ),
    Run(
        name="DeepSeek-V3 671B, torchtitan with DeepEP",
        source=COOKBOOK,
        hardware="b200",
        ranks=256,
        ep=32,
        tokens_per_second=859,
        job=DEEPSEEK_671B_TP2,
    ),
)


@dataclass
class Arguments:
    """Flags of the benchmark."""

    only: tuple[str, ...] = ()
    """Names of runs, or parts of them."""


def main() -> None:
    """Print the rows of the table."""
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
            f"| {run.name} | {run.ranks:,} {run.hardware.upper()} | {run.ep} | {measured:.2f} s | {predicted:.2f} s "
            f"| {predicted / measured - 1:+.0%} | {'; '.join(differs)} | {run.source} |",
            flush=True,
        )


def _predict(run: Run, device: str) -> tuple[int, float]:
    """Plan a run; return the tokens of a step and its seconds at balance."""
    plan = planned(run.job, hardware=device, ranks=run.ranks, ep=run.ep, dispatcher=run.dispatcher)
    return plan.job.tokens_per_step, plan.degrees[0].balance.step_seconds


def _changed(name: str, factors: Mapping[str, float], folder: str) -> str:
    """Write a copy of a device with some numbers multiplied by factors; return its path."""
    device = hardware(name)
    figures = {name: getattr(device, name) * factors.get(name, 1) for name in SPECS}
    figures["scale_up_domain"] = device.scale_up_domain
    file = Path(folder) / "device.toml"
    file.write_text(tomli_w.dumps(figures))
    return str(file)


if __name__ == "__main__":
    main()
