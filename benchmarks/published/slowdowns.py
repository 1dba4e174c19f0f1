"""Published slowdowns at a measured imbalance, compared with the plan.

    OMP_NUM_THREADS=1 python -m benchmarks.published.slowdowns

UltraEP (arXiv 2606.04101v3), figure 11, reports TFLOP/s per GPU and the load of the busiest rank
over the mean. It compares one job without balancing, with three balancers, with UltraEP, and with
forced balance. The slowdown is the TFLOP/s under forced balance over the TFLOP/s of each system.
The plan uses log-normal loads whose busiest rank has the reported load on average. Prints the rows
of the table in docs/evidence/published_runs.md.

The paper names neither its GPUs nor the tokens of a micro-batch. We assume GB200: the paper has
racks of 64 GPUs, four GPUs to a server, and more TFLOP/s than three quarters of an H100's peak. We
assume 8,192 tokens, which reproduce the time of its experts in figure 13.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.published.jobs import DEEPSEEK_671B, GLM_AIR, QWEN_235B, job, pipeline, planned
from titan_moe_lb.commands.plan.result import Plan

SYSTEMS = ("none", "EPLB", "LPLB", "EPLB of exact loads", "UltraEP")
EP = 64
BATCH = 5120
"""Sequences of a global batch; the paper's batches grow from 1,024 to this size."""
SEQ_LEN = 8192


@dataclass(frozen=True, kw_only=True)
class Model:
    """Model with the numbers of figure 11 for each of ``SYSTEMS``."""

    name: str
    ranks: int
    balanced_tflops: float
    tflops: tuple[float, ...]
    imbalance: tuple[float, ...]
    job: tuple[str, ...]

    def plan(self) -> Plan:
        """Plan the job under log-normal loads of each reported imbalance."""
        return planned(
            self.job,
            hardware="gb200_nvl72",
            ranks=self.ranks,
            ep=EP,
            dispatcher="deepep",
            imbalance=",".join(f"overload:{factor}@{EP}" for factor in self.imbalance),
        )

    def predicted(self) -> list[float]:
        """Predict the slowdown of a step at each imbalance."""
        return [row.outcome.step_slowdown for row in self.plan().degrees[0].lognormal]

    def measured(self) -> list[float]:
        """Compute the reported slowdown of a step with each system."""
        return [self.balanced_tflops / tflops for tflops in self.tflops]


MODELS = (
    Model(
        name="GLM-4.5-Air, EP 64, DP 2",
        ranks=128,
        balanced_tflops=785.4,
        tflops=(545, 646, 618, 695, 757),
        imbalance=(2.23, 1.34, 1.29, 1.10, 1.02),
        job=job(GLM_AIR, local=1, batch=BATCH, ac="None", seq_len=SEQ_LEN),
    ),
    Model(
        name="Qwen3 235B-A22B, EP 64, DP 4",
        ranks=256,
        balanced_tflops=574.7,
        tflops=(315, 449, 385, 474, 524),
        imbalance=(2.86, 1.34, 1.58, 1.17, 1.03),
        job=job(QWEN_235B, local=1, batch=BATCH, ac="None", seq_len=SEQ_LEN),
    ),
    Model(
        name="DeepSeek-V3 671B, EP 64, PP 4",
        ranks=256,
        balanced_tflops=637.6,
        tflops=(509, 505, 516, 553, 613),
        imbalance=(1.30, 1.28, 1.09, 1.18, 1.01),
        job=job(
            DEEPSEEK_671B,
            *pipeline(4, 4),
            local=BATCH // EP,
            batch=BATCH,
            ac="None",
            seq_len=SEQ_LEN,
        ),
    ),
)


QWEN = MODELS[1]
LAYER = {"forced to balance": 6.40 + 10.43, "no balancing": 15.77 + 19.68}
"""Milliseconds of one layer of this model, forward and backward: the sums of figure 13."""


def main() -> None:
    """Print the rows of the table, and the times of a layer."""
    print("| run | balanced by | imbalance | slow-down | predicted | deviation |")
    print("|---|---|---|---|---|---|")
    for model in MODELS:
        rows = zip(SYSTEMS, model.imbalance, model.measured(), model.predicted(), strict=True)
        for system, imbalance, measured, predicted in rows:
            print(
                f"| {model.name} | {system} | {imbalance:.2f} | {measured:.2f} "
                f"| {predicted:.2f} | {predicted / measured - 1:+.0%} |",
                flush=True,
            )
    plan = QWEN.plan()
    degree = plan.degrees[0]
    passes = plan.job.accumulation_steps * len(plan.job.moe_layers)
    for (case, measured), outcome in zip(
        LAYER.items(), (degree.balance, degree.lognormal[0].outcome), strict=True
    ):
        ours = 1e3 * outcome.step_seconds / passes
        print(f"{QWEN.name}, {case}: a layer {measured:.2f} ms, a step per layer {ours:.2f}")


if __name__ == "__main__":
    main()
