"""Bytes of a bias rule's histogram: held, and sent between ranks; and the most it can count."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from tests.support.histogram_jobs import sums_of_a_large_step, sums_of_a_step_end
from tests.support.telemetry_jobs import forward_and_backward, moe_layers
from titan_moe_lb.balancing.recording.step_record import MOST_OBSERVATIONS
from titan_moe_lb.balancing.router import routers_of
from titan_moe_lb.balancing.step_hook import StepHook, wire, wire_parts
from titan_moe_lb.errors import JobError
from titan_moe_lb.job import job_config
from titan_moe_lb.parallel.rank_groups import RankGroups


def alive() -> int:
    """Bytes of all storages of tensors."""
    gc.collect()
    tensors = (one for one in gc.get_objects() if type(one) is torch.Tensor)
    storages = [one.untyped_storage() for one in tensors]
    return sum({one.data_ptr(): one.nbytes() for one in storages}.values())


def held_after_a_step(rule: str) -> int:
    layers = moe_layers([0, 1], [], expert_bias=rule)
    before = alive()
    hook = StepHook(layers, wire([layer.router for layer in layers], RankGroups()), RankGroups())
    forward_and_backward(layers)
    hook.close_step()
    return alive() - before


@pytest.mark.parametrize("rule", ["quantile", "quantile_trend"])
def test_bytes_that_a_histogram_holds(rule):
    """Two layers of 8 experts with 1,000 bins an expert, against a rule without bins."""
    assert held_after_a_step(rule) - held_after_a_step("sign") == 4 * 2 * 8 * 1000


@pytest.mark.parametrize("rule", ["quantile", "quantile_trend"])
def test_bytes_that_a_step_sends(ranks, rule):
    """Counts and losses in float64, the histogram in int32; what arrives is the sum."""
    by_rank = ranks.run(2, sums_of_a_step_end, rule)
    for sent, _mine, total, bias in by_rank:
        assert sent == [(torch.float64, 8 * 3 * 8), (torch.int32, 4 * 3 * 8 * 1000)]
        assert torch.equal(total, by_rank[0][1] + by_rank[1][1])
        assert bias.any() and torch.equal(bias, by_rank[0][3])
    assert not torch.equal(by_rank[0][1], by_rank[1][1])


def sizes_of_671b(tmp_path: Path) -> dict[str, int]:
    """Sizes of the record of all layers, from the model of the job without memory."""
    path = tmp_path / "job.toml"
    path.write_text(
        '[job]\nmodule = "deepseek_v3"\nflavor = "671B"\n'
        '[model]\nexpert_bias = "quantile"\naux_losses = []\n'
        "[parallelism]\nexpert_parallel_degree = 1\n"
    )
    routers = routers_of([job_config.load(["--job-config", str(path)]).meta_model])
    record = wire(routers, RankGroups())
    assert record.histogram_NEH.nbytes == 4 * 58 * 256 * 1000
    num_routers, num_experts, num_bins = record.histogram_NEH.shape
    sizes = {"num_routers": num_routers, "num_experts": num_experts, "num_bins": num_bins}
    return {**sizes, "num_sources": record.counts_NMSE.shape[2], "num_losses": 0}


def test_bytes_of_the_largest_model(ranks, tmp_path):
    """DeepSeek-V3 671B in one stage: 59.4 MB held, 59.4 MB and 0.1 MB of counts sent a step."""
    sizes = sizes_of_671b(tmp_path)
    for sent, full_bin in ranks.run(2, sums_of_a_large_step, sizes):
        assert sent == [(torch.float64, 8 * 58 * 256), (torch.int32, 4 * 58 * 256 * 1000)]
        assert full_bin == MOST_OBSERVATIONS == 2**31 - 1


def test_more_tokens_than_a_histogram_counts_are_refused():
    """Two forwards of rows of meta tokens: the first has the most, the second one row more."""
    layers = moe_layers([0], [], expert_bias="quantile")
    hook = wire_parts([layers[0]], RankGroups())
    rows = MOST_OBSERVATIONS // 2048
    hook.forward_begins(layers[0], (torch.empty(rows, 2048, device="meta"),), {})
    with pytest.raises(JobError, match="expert_bias"):
        hook.forward_begins(layers[0], (torch.empty(1, 2048, device="meta"),), {})
    hook.skip_step()
    hook.forward_begins(layers[0], (torch.empty(1, 2048, device="meta"),), {})
