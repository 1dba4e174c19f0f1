"""Tests of the parameter counts of every published flavor."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomli

from tests.job.test_configs import CONFIGS
from tests.support.train_jobs import build_one_rank
from titan_moe_lb.job import job_config


def deepseek_v3() -> int:
    """arXiv 2412.19437, section 4.2: 61 layers, the first 3 dense, 256 experts and a shared one."""
    dim, heads, q_rank, kv_rank, nope, rope, value, vocab = (
        7168,
        128,
        1536,
        512,
        128,
        64,
        128,
        129280,
    )
    queries = dim * q_rank + q_rank + q_rank * heads * (nope + rope)
    keys_values = dim * (kv_rank + rope) + kv_rank + kv_rank * heads * (nope + value)
    attention = queries + keys_values + heads * value * dim + 2 * dim
    dense = 3 * dim * 18432
    moe = 256 * dim + 257 * 3 * dim * 2048
    return 61 * attention + 3 * dense + 58 * moe + dim + 2 * vocab * dim


def qwen3(layers: int, dim: int, heads: int, hidden: int) -> int:
    """arXiv 2505.09388, Table 2: 4 key-value heads, 128 experts; head size 128."""
    attention = 2 * dim * heads * 128 + 2 * dim * 4 * 128 + 2 * 128 + 2 * dim
    moe = 128 * dim + 128 * 3 * dim * hidden
    return layers * (attention + moe) + dim + 2 * 151936 * dim


def gpt_oss(layers: int, experts: int) -> int:
    """arXiv 2508.10925, Table 1: 64 query and 8 key-value heads of size 64; biases everywhere."""
    dim, hidden, queries, keys = 2880, 2880, 64 * 64, 8 * 64
    attention = (dim + 1) * (queries + 2 * keys) + (queries + 1) * dim + 64 + 2 * dim
    moe = (dim + 1) * experts + experts * ((dim + 1) * 2 * hidden + (hidden + 1) * dim)
    return layers * (attention + moe) + dim + 2 * 201088 * dim


def llama4(experts: int, moe_layers: int) -> int:
    """config.json of meta-llama's models: 48 layers, 40 query and 8 key-value heads of size 128."""
    dim, hidden, vocab = 5120, 8192, 202048
    attention = 2 * dim * 40 * 128 + 2 * dim * 8 * 128 + 2 * dim
    moe = experts * dim + (experts + 1) * 3 * dim * hidden
    dense = 3 * dim * 2 * hidden
    return 48 * attention + moe_layers * moe + (48 - moe_layers) * dense + dim + 2 * vocab * dim


SIZES = {
    # By hand from the report, and what it or the model card says.
    ("deepseek_v3", "671B"): (deepseek_v3(), 671e9),
    ("qwen3", "30B-A3B"): (qwen3(48, 2048, 32, 768), 30.5e9),
    ("qwen3", "235B-A22B"): (qwen3(94, 4096, 64, 1536), 235e9),
    ("gpt_oss", "20b"): (gpt_oss(24, 32), 20.91e9),
    ("gpt_oss", "120b"): (gpt_oss(36, 128), 116.83e9),
    # The published checkpoints less the 871,932,416 of the vision tower and its projector.
    ("llama4", "17Bx16E"): (llama4(16, 48), 108641793536 - 871932416),
    ("llama4", "17Bx128E"): (llama4(128, 24), 401583781376 - 871932416),
}

REAL_SIZES = [
    path
    for path in sorted(CONFIGS.glob("*/*.toml"))
    if tomli.loads(path.read_text())["job"]["ranks"] > 4
]
assert REAL_SIZES, f"no job files in {CONFIGS}"


def number_of_parameters(job_file: Path, num_ranks: int = 1) -> int:
    """Count the parameters of a job's whole model, built without memory."""
    model = job_config.load(["--job-config", str(job_file)], num_ranks).meta_model
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("module", "flavor"), SIZES)
def test_number_of_parameters(module, flavor, tmp_path):
    path = tmp_path / "job.toml"
    path.write_text(
        f'[job]\nmodule = "{module}"\nflavor = "{flavor}"\n'
        "[parallelism]\nexpert_parallel_degree = 1\n"
    )
    by_hand, published = SIZES[module, flavor]
    assert number_of_parameters(path) == by_hand
    assert by_hand == pytest.approx(published, rel=0.002)


@pytest.mark.parametrize("path", REAL_SIZES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_one_rank_of_a_real_size_builds(ranks, path):
    """Only rank 0 is built; in a pipeline it has other layers than the rest."""
    job = tomli.loads(path.read_text())
    num_ranks = job["job"]["ranks"]
    (parameters,) = ranks.run(1, build_one_rank, str(path), num_ranks)
    shares = num_ranks // job["parallelism"].get("data_parallel_replicate_degree", 1)
    assert 0.5 < parameters * shares / number_of_parameters(path, num_ranks) < 1.5
