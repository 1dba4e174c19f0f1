"""Tests of data that end on one rank first: all ranks stop with it."""

from __future__ import annotations

import pytest
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from tests.support.train_jobs import train, train_to_the_end
from titan_moe_lb.data import TOKENIZER_PATH, documents

ROWS, LENGTH = 2, 64
JOB = [
    "--config=deepseek_v3_tiny",
    f"--training.local_batch_size={ROWS}",
    f"--training.seq_len={LENGTH}",
    "--validator.enable",
    "--metrics.no-write_moe_trace",
    "--debug.seed=1",
]
TEXTS = [text[:size] for text, size in zip(documents()[:8], [2000] * 4 + [700] * 4, strict=True)]


def rows(texts: list[str]) -> int:
    """Number of rows of a rank with these texts, counted by hand."""
    tokenizer = HuggingFaceTokenizer(tokenizer_path=TOKENIZER_PATH)
    tokens = [tokenizer.encode(text, add_bos=True, add_eos=True) for text in texts]
    return sum(len(one) - 1 for one in tokens) // LENGTH


def batches(texts: list[str]) -> int:
    return rows(texts) // ROWS


def validated(logged: list[list[dict[str, float]]]) -> float:
    return logged[0][0]["validation_metrics/loss"]


@pytest.mark.parametrize(
    ("ranks_of_job", "layout"),
    [
        (2, ["--parallelism.data_parallel_shard_degree=2"]),
        (
            4,
            [
                "--parallelism.data_parallel_shard_degree=2",
                "--parallelism.pipeline_parallel_degree=2",
            ],
        ),
    ],
    ids=["fsdp2", "pp2_fsdp2"],
)
def test_a_whole_validation_set_is_as_many_steps_as_the_shortest_rank_has(
    ranks_of_job, layout, ranks
):
    most, least = batches(TEXTS[:4]), batches(TEXTS[4:])
    assert most > least + 2 > 4
    job = [*JOB, *layout, "--training.steps=1", "--validator.domains", "uneven"]
    whole, counted = (
        validated(
            ranks.run(ranks_of_job, train_to_the_end, [*job, f"--validator.steps={steps}"], TEXTS)
        )
        for steps in (-1, least)
    )
    assert whole == pytest.approx(counted, rel=1e-6)


def test_no_batch_on_one_rank_is_refused_on_all(ranks):
    job = [*JOB, "--parallelism.data_parallel_shard_degree=2", "--training.steps=1"]
    job += ["--validator.domains", "uneven", "--validator.steps=-1"]
    with pytest.raises(RuntimeError, match="JobError.*validator.dataloader"):
        ranks.run(2, train_to_the_end, job, [TEXTS[0], "short"])


def test_finite_training_data_end_with_the_shortest_rank(ranks):
    job = [*JOB, "--parallelism.data_parallel_shard_degree=2", "--training.steps=1000"]
    job += ["--dataloader.dataset=uneven", "--dataloader.no-infinite", "--validator.no-enable"]
    logged = ranks.run(2, train_to_the_end, job, TEXTS)
    assert len(logged[0]) == len(logged[1]) == batches(TEXTS[4:])


def test_a_pipeline_leaves_out_a_batch_that_is_not_full(ranks):
    """Seven rows make a step of two micro-batches of two rows; three rows are not read."""
    texts = [TEXTS[4][:600], *TEXTS[5:7]]
    assert rows(texts) == 7
    job = [*JOB, "--training.steps=1", "--training.local_batch_size=4"]
    job += ["--parallelism.pipeline_parallel_degree=2", "--validator.domains", "uneven"]
    job += ["--parallelism.pipeline_parallel_microbatch_size=2"]
    whole, counted = (
        ranks.run(2, train_to_the_end, [*job, f"--validator.steps={steps}"], texts)[1]
        for steps in (-1, 1)
    )
    assert validated([whole]) == pytest.approx(validated([counted]), rel=1e-6)


def test_validation_of_a_debug_job_needs_no_network(ranks):
    flags = ["--training.steps=2", "--validator.enable", "--validator.freq=2"]
    flags += ["--validator.steps=10"]
    ((first, second),) = ranks.run(1, train, ["--config", "deepseek_v3_tiny", *flags])
    losses = [step["validation_metrics/loss"] for step in (first, second)]
    assert losses[1] < losses[0] < 9.0
