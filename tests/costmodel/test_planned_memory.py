"""Tests of planned memory, against torch's own count in a real second step on gloo."""

from __future__ import annotations

import pytest

from tests.support import memory_jobs, planning
from tests.support.memory_jobs import BALANCED, LAYOUTS

TINY = "deepseek_v3_tiny"
CASES = {
    # Layout, model, tokens of a sequence, sequences of a rank: each varied once.
    "selective": ("EP 4, selective", TINY, 128, 8),
    "tensor parallel": ("TP 2, EP 4", TINY, 128, 8),
    "pipeline, full": ("Interleaved1F1B, EP 2, full", TINY, 128, 8),
    "long sequences": ("FSDP 2", TINY, 320, 4),
    "one short sequence": ("FSDP 2", TINY, 128, 1),
    "four times as wide": ("FSDP 2", "deepseek_v3_debugmodel", 128, 2),
    "other attention": ("FSDP 2", "qwen3_tiny", 128, 8),
}


@pytest.mark.parametrize("case", CASES)
def test_planned_memory_is_that_of_torch(ranks, case):
    """The planned peak is within 15 % on the first rank of every pipeline position."""
    layout, config, seq_len, batch = CASES[case]
    num_ranks, flags = LAYOUTS[layout]
    ranks.need(num_ranks)
    model = ["--module", config.rpartition("_")[0], "--config", config, BALANCED]
    sizes = [f"--training.seq_len={seq_len}", f"--training.local_batch_size={batch}"]
    job = [*model, *sizes, *flags]
    (planned,) = ranks.run(1, memory_jobs.planned_bytes, job, num_ranks)
    measured = ranks.run(num_ranks, memory_jobs.measured_bytes, job)
    found = {rank: expected / measured[rank] for rank, expected in planned.items()}
    assert found == pytest.approx(dict.fromkeys(planned, 1.0), rel=0.15)


def test_a_block_of_an_unknown_kind_is_not_left_out(ranks):
    (said,) = ranks.run(1, planning.block_without_norm)
    assert said.startswith("layers.7 is a Linear without an attention_norm")
