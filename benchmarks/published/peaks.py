"""Published peaks of GPU memory, compared with the plan at balance.

    OMP_NUM_THREADS=1 python -m benchmarks.published.peaks

Prints the rows of the table in docs/evidence/published_runs.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.published.jobs import (
    DEEPSEEK_16B,
    NOUS,
    NOUS_9B,
    PITH_TRAIN,
    QWEN_30B_FSDP,
    job,
    planned,
)

GIB = 2**30
HOST = str(Path(__file__).with_name("composed_operators.toml"))
"""Device whose attention runs as several operators; the peak does not depend on its speed."""
B200_GIB = 178.4
"""Capacity of a B200 in torchtitan's logs: its pull 2389 reports 66.91 GiB as 37.51 %."""


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Published peak of a run, with the job that comes closest to it."""

    name: str
    source: str
    hardware: str
    """Device of the plan."""
    ranks: int
    ep: int
    gib: float
    job: tuple[str, ...]
    above: bool = False
    """True if the run did not fit into ``gib``."""
    gpu: str = ""
    """Device of the run, if it is another one."""
    kind: str = "reserved"
    """Kind of torch's memory statistic: reserved by the allocator, or active in it."""
    differs: str = ""
    """Differences between the run and the job."""
    unknown: str = ""
    """Unknown facts of the run, which rule out a bound on the deviation."""

    def planned_gib(self) -> float:
        """Plan the job and return its peak at balance in GiB."""
        plan = planned(self.job, hardware=self.hardware, ranks=self.ranks, ep=self.ep)
        return plan.degrees[0].balance.memory_bytes / GIB


def _deepseek_16b(local: int, checkpointing: str, seq_len: int = 4096) -> tuple[str, ...]:
    return job(DEEPSEEK_16B, local=local, batch=8 * local, ac=checkpointing, seq_len=seq_len)


DEBUG = job(
    ("deepseek_v3", "deepseek_v3_debugmodel"), local=8, batch=32, ac="selective", seq_len=2048
)
PULL_3000 = "github.com/pytorch/torchtitan/pull/3000"
PULL_1993 = "github.com/pytorch/torchtitan/pull/1993"

PEAKS = (
    Peak(
        name="DeepSeek-V3 of 9.5B, EP 8, none",
        source=NOUS,
        hardware="b200",
        ranks=8,
        ep=8,
        gib=105.26,
        job=NOUS_9B,
        kind="active",
        differs="the mean of its 8 GPUs, 91.15 to 123.88: its experts are not balanced",
    ),
    Peak(
        name="DeepSeek-V3 16B, FSDP, none, 4 sequences of 6,144",
        source=PULL_1993,
        hardware="b200",
        ranks=8,
        ep=1,
        gib=0.88 * B200_GIB,
        job=_deepseek_16b(4, "None", seq_len=6144),
    ),
    Peak(
        name="DeepSeek-V3 16B, FSDP, none, 8 sequences of 4,096",
        source=PULL_1993,
        hardware="b200",
        ranks=8,
        ep=1,
        gib=B200_GIB,
        above=True,
        job=_deepseek_16b(8, "None"),
    ),
    Peak(
        name="Qwen3 30B-A3B, FSDP, selective",
        source=PITH_TRAIN,
        hardware="b200",
        ranks=8,
        ep=1,
        gib=141.79,
        job=QWEN_30B_FSDP,
        differs="blocks are compiled",
    ),
    Peak(
        name="DeepSeek-V3 16B, EP 4, full, 16 sequences",
        source="github.com/pytorch/torchtitan/pull/3639",
        hardware="h100",
        ranks=8,
        ep=4,
        gib=68.8,
        job=_deepseek_16b(16, "full"),
        unknown="the imbalance of its learned routing; EP is that of pull 3612",
    ),
    Peak(
        name="DeepSeek-V3 debug model, FSDP, selective",
        source=PULL_3000,
        gpu="A100",
        hardware="h100",
        ranks=4,
        ep=1,
        gib=22.19,
        job=DEBUG,
        unknown="which kernel its attention took",
    ),
    Peak(
        name="the same, attention composed of operators",
        source=PULL_3000,
        gpu="A100",
        hardware=HOST,
        ranks=4,
        ep=1,
        gib=22.19,
        job=DEBUG,
        unknown="as above",
    ),
)


def main() -> None:
    """Print the rows of the table."""
    print("| run | GPUs | published | planned | deviation | not in the job | source |")
    print("|---|---|---|---|---|---|---|")
    for peak in PEAKS:
        gib = peak.planned_gib()
        if peak.above:
            published, deviation = f"over {peak.gib:.1f} GiB", "fits" if gib < peak.gib else "over"
        else:
            published = f"{peak.gib:.2f} GiB, {peak.kind}"
            deviation = f"{gib / peak.gib - 1:+.0%}"
        print(
            f"| {peak.name} | {peak.ranks} {peak.gpu or peak.hardware.upper()} | {published} | {gib:.2f} GiB | {deviation} "
            f"| {peak.differs or peak.unknown} | {peak.source} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
