"""Jobs that come closest to published runs, and their plans."""

from __future__ import annotations

from titan_moe_lb.commands.plan.command import make_plan
from titan_moe_lb.commands.plan.plan_arguments import PlanArguments
from titan_moe_lb.commands.plan.result import Plan
from titan_moe_lb.costmodel.times.moe_layer import Dispatcher

OWN = "benchmarks.published.models"
"""Module of the models that the registry lacks."""


GLM_AIR = (OWN, "glm45_air")
DEEPSEEK_9B = (OWN, "deepseek_9b")
DEEPSEEK_16B = ("deepseek_v3", "deepseek_v3_16b")
DEEPSEEK_671B = ("deepseek_v3", "deepseek_v3_671b")
QWEN_30B = ("qwen3", "qwen3_30b_a3b")
QWEN_235B = ("qwen3", "qwen3_235b_a22b")
"""Module and config of each model."""


def job(
    model: tuple[str, str], *more: str, local: int, batch: int, ac: str, seq_len: int = 4096
) -> tuple[str, ...]:
    """Build the flags of a job, with batch sizes in sequences; ``ac`` is the checkpointing."""
    module, config = model
    return (
        f"--module={module}",
        f"--config={config}",
        f"--training.seq_len={seq_len}",
        "--model.aux_losses=[]",
        f"--training.local_batch_size={local}",
        f"--training.global_batch_size={batch}",
        *more,
        f"--activation_checkpoint.type={ac}",
    )


def pipeline(degree: int, layers: int | None = None) -> tuple[str, ...]:
    """Build the flags of an interleaved pipeline.

    ``layers`` are those of each stage; default: two stages on each rank.
    """
    stages = (
        f"--parallelism.pipeline_parallel_degree={degree}",
        "--parallelism.pipeline_parallel_schedule=Interleaved1F1B",
    )
    if layers is None:
        return stages
    return (*stages, f"--parallelism.pipeline_parallel_layers_per_stage={layers}")


QWEN_30B_FSDP = job(QWEN_30B, local=8, batch=64, ac="selective", seq_len=8192)
PITH_TRAIN = "github.com/mlc-ai/pith-train/issues/79"

NOUS_9B = job(DEEPSEEK_9B, local=6, batch=48, ac="None")
NOUS = "github.com/NousResearch/torchtitan, docs/llep.md"


def planned(
    flags: tuple[str, ...],
    *,
    hardware: str,
    ranks: int,
    ep: int,
    dispatcher: Dispatcher = "standard",
    imbalance: str = "1.0",
    measured_step: float | None = None,
) -> Plan:
    """Plan the job of these flags at one expert-parallel degree, as ``titan-moe-lb plan`` does."""
    return make_plan(
        PlanArguments(
            hardware=hardware,
            ranks=ranks,
            ep=str(ep),
            imbalance=imbalance,
            dispatcher=dispatcher,
            measured_step=measured_step,
            job_flags=(*flags, f"--parallelism.expert_parallel_degree={ep}"),
        )
    )
