"""Tests of the forced strategies on one router and on EP ranks."""

from __future__ import annotations

import collections
import functools
import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.train_jobs import train
from titan_moe_lb.balancing.forced_routing.functional import (
    _mix,
    hash_seed,
    hot_share_ids,
    round_robin_ids,
    standard_normal,
    uniform,
)
from titan_moe_lb.balancing.router import routers_of
from titan_moe_lb.errors import JobError
from titan_moe_lb.job import job_config
from titan_moe_lb.parallel.rank_groups import RankGroups
from titan_moe_lb.traces import routing_trace
from titan_moe_lb.traces.routing_trace import RoutingTrace
from titan_moe_lb.traces.trace import read_trace

# 8 sequences of 128 tokens, top 2 of 8 experts in 4 groups of which 2 are open; layers 1 to 3.
TINY = ["--module", "deepseek_v3", "--config", "deepseek_v3_tiny", "--training.local_batch_size=8"]
BATCH, LENGTH, TOP_K, EXPERTS, LAYERS = 8, 128, 2, 8, (1, 2, 3)
CHOICES = BATCH * LENGTH * TOP_K


def force(table: str) -> list[str]:
    return [f"--model.forced_routing={{{table}}}"]


def run(ranks, num_ranks, folder, *arguments, steps=2):
    """Train and read the trace back."""
    flags = [*TINY, f"--dump_folder={folder}", f"--training.steps={steps}", *arguments]
    by_rank = ranks.run(num_ranks, train, flags)
    assert all(logged[0]["grad_norm"] == by_rank[0][0]["grad_norm"] for logged in by_rank)
    return read_trace(folder), by_rank[0]


@given(
    st.integers(1, 40),
    st.integers(1, 12).flatmap(lambda e: st.tuples(st.just(e), st.integers(1, e))),
    st.integers(0, 50),
)
def test_round_robin_deals_evenly(num_tokens, shape, first_token):
    num_experts, top_k = shape
    tokens = torch.arange(first_token, first_token + num_tokens)
    ids = round_robin_ids(tokens, top_k, num_experts)
    assert all(len(set(row)) == top_k for row in ids.tolist())
    counts = torch.bincount(ids.flatten(), minlength=num_experts)
    assert counts.max() - counts.min() <= 1


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_hot_share_is_exact(data):
    """Exactly H choices go to hot experts; hot and cold experts have even loads among
    themselves."""
    num_hot, num_cold = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    top_k = data.draw(st.integers(1, num_hot + num_cold))
    num_ranks, per_rank = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 20))
    total = num_ranks * per_rank
    low, high = max(0, top_k - num_cold) * total, min(num_hot, top_k) * total
    num_hot_choices = data.draw(st.integers(low, high))
    hot = torch.arange(num_hot) + 100
    cold = torch.arange(num_cold)
    ids = torch.cat(
        [
            hot_share_ids(
                torch.arange(rank * per_rank, (rank + 1) * per_rank),
                top_k,
                hot,
                cold,
                num_hot_choices=num_hot_choices,
                total_tokens=total,
            )
            for rank in range(num_ranks)
        ]
    )
    assert all(len(set(row)) == top_k for row in ids.tolist())
    assert (ids >= 100).sum() == num_hot_choices
    for experts in (hot, cold):
        counts = [(ids == expert).sum().item() for expert in experts]
        assert max(counts) - min(counts) <= 1


def test_random_numbers_are_independent_and_of_their_distribution():
    seed, number = torch.tensor(hash_seed(1, 2)), torch.tensor(5)
    draw = uniform(seed, number, (400, 500)).double()
    assert draw.min() > 0 and draw.max() < 1
    assert draw.mean().item() == pytest.approx(1 / 2, abs=0.003)
    assert draw.var().item() == pytest.approx(1 / 12, abs=0.001)
    others = [
        uniform(torch.tensor(hash_seed(1, 3)), number, (400, 500)),
        uniform(seed, number + 1, (400, 500)),
        draw.roll(1, dims=1),
        draw.roll(1, dims=0),
    ]
    for other in others:
        pair = torch.stack([draw.flatten(), other.double().flatten()])
        assert abs(torch.corrcoef(pair)[0, 1].item()) < 0.01
    normal = standard_normal(seed, number, (200_000,)).double()
    assert normal.mean().item() == pytest.approx(0, abs=0.01)
    assert normal.std().item() == pytest.approx(1, abs=0.01)
    assert (normal.abs() > 1.959964).double().mean().item() == pytest.approx(0.05, abs=0.002)


# (seed, number) as RandomRouting and the router make them.
STREAMS = {
    "forwards of one router": [(hash_seed(0, 1, 1), number) for number in range(4800)],
    "routers": [
        (hash_seed(seed, layer, *place), number)
        for seed in (0, 1)
        for layer in range(6)
        # Shared by all ranks, and of one rank.
        for place in [(), *[(rank + 1,) for rank in range(7)]]
        for number in range(13)
    ],
}


@pytest.mark.parametrize("streams", STREAMS)
def test_streams_do_not_overlap(streams):
    """No stretch of one stream occurs in another, and no value repeats at one position of many
    streams."""
    size = 2**10
    whole_SN = np.stack(
        [
            (uniform(torch.tensor(seed), torch.tensor(number), (size,)) * 2**23).long().numpy()
            for seed, number in STREAMS[streams]
        ]
    )
    # Three values in a row, 21 bits each: by chance equal in 2^-63 of all pairs.
    rows_SN = whole_SN >> 2
    stretches_SN = rows_SN[:, :-2] << 42 | rows_SN[:, 1:-1] << 21 | rows_SN[:, 2:]
    beginnings = np.sort(stretches_SN[:, 0])
    found = np.searchsorted(beginnings, stretches_SN).clip(max=len(beginnings) - 1)
    overlaps = (beginnings[found] == stretches_SN).sum() - len(beginnings)
    assert overlaps == 0, f"{overlaps} streams begin in another"
    # 4,800 values of 2^23 at one place: 1.4 equal pairs are to be expected.
    in_order_SN = np.sort(whole_SN, axis=0)
    assert (in_order_SN[1:] == in_order_SN[:-1]).sum(axis=0).max() < 15


@pytest.mark.parametrize("streams", STREAMS)
def test_streams_do_not_correlate(streams):
    """Correlations of n values have a standard deviation of about n^-1/2 around 0."""
    size = 2**12
    values = [
        uniform(torch.tensor(seed), torch.tensor(number), (size,))
        for seed, number in STREAMS[streams][:1200]
    ]
    correlations = np.corrcoef(torch.stack(values).double().numpy())[
        np.triu_indices(len(values), 1)
    ]
    assert abs(correlations).max() < 6.5 / size**0.5
    assert correlations.std() == pytest.approx(size**-0.5, rel=0.01)


def test_seeds_of_large_jobs_differ():
    """40 jobs of 61 layers on 4,096 ranks have distinct seeds; 32 bits would not suffice."""
    of_layer = torch.tensor([hash_seed(job, layer) for job in range(40) for layer in range(61)])
    # hash_seed(job, layer, place), for all places of a layer at once.
    seeds = _mix(of_layer[:, None] + torch.arange(1, 4097))
    assert int(seeds[60, 4095]) == hash_seed(0, 60, 4096)
    assert seeds.unique().numel() == 40 * 61 * 4096


def test_round_robin_is_exact_on_four_ranks(ranks, tmp_path):
    layout = ["--parallelism.expert_parallel_degree=4", "--training.local_batch_size=2"]
    trace, _ = run(ranks, 4, tmp_path, *force('type = "round_robin"'), *layout)
    assert trace.layers == LAYERS
    assert (trace.counts_SME == CHOICES // EXPERTS).all()
    assert (trace.layer_columns["max_overload_factor"] == 1).all() and (
        trace.step_columns["max_cum_overload_factor"] == 1
    ).all()


LAYOUTS = {
    "ep2": (2, ["--training.local_batch_size=4"]),
    "ep4": (4, ["--training.local_batch_size=2"]),
    **{
        schedule: (
            2,
            [
                "--training.local_batch_size=4",
                "--parallelism.pipeline_parallel_degree=2",
                f"--parallelism.pipeline_parallel_schedule={schedule}",
            ],
        )
        for schedule in ("1F1B", "Interleaved1F1B", "ZBVZeroBubble")
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_hot_rank_overload_is_the_hand_computed_one(ranks, tmp_path, layout):
    ep, flags = LAYOUTS[layout]
    num_ranks = 4 if "pipeline" in " ".join(flags) else ep
    hot, fraction = ep - 1, Fraction(5, 8)
    forced = force(f'type = "hot_rank", rank = {hot}, fraction = {float(fraction)}')
    ep_flag = f"--parallelism.expert_parallel_degree={ep}"
    trace, logged = run(ranks, num_ranks, tmp_path, *forced, ep_flag, *flags)

    per_rank = trace.counts_SME.reshape(*trace.counts_SME.shape[:2], ep, -1).sum(axis=-1)
    assert (per_rank.sum(axis=-1) == CHOICES).all()
    assert (per_rank[..., hot] == fraction * CHOICES).all()
    expected = float(fraction * ep)
    assert (trace.layer_columns["avg_overload_factor"] == expected).all()
    assert (trace.layer_columns["max_overload_factor"] == expected).all()
    assert (trace.step_columns["max_cum_overload_factor"] == expected).all()
    assert logged[0]["moe/max_cum_overload_factor"] == expected


def test_hot_rank_keeps_an_odd_share_to_within_one_token(ranks, tmp_path):
    forced = force('type = "hot_rank", ranks = [0], fraction = 0.7')
    flags = ["--parallelism.expert_parallel_degree=2", "--training.local_batch_size=2"]
    accumulate = ["--training.global_batch_size=8"]
    trace, _ = run(ranks, 2, tmp_path, *forced, *flags, *accumulate, steps=1)
    # Two micro-batches of 4 sequences: 716.8 choices each, over the two ranks together.
    share = trace.counts_SME[0, :, : EXPERTS // 2].sum(axis=-1)
    assert (share == 2 * 717).all()


def positions(arguments):
    """Positions 0, 1, 2, ... that torchtitan gives to this rank, and those that we expect."""
    config = job_config.load(arguments).config
    config.metrics.write_moe_trace = False
    trainer = config.build()
    whole = torch.arange(config.training.seq_len).expand(BATCH, -1).contiguous()
    batch = {"input": torch.zeros_like(whole), "positions": whole}
    _inputs, _labels, extra = trainer.post_dataloading_process(batch, torch.zeros_like(whole))
    seen = extra["positions"][0].tolist()
    slices = RankGroups.of(trainer.parallel_dims).token_slices(
        config.training.seq_len, config.parallelism.context_parallel_load_balancer
    )
    trainer.close()
    return seen, [start + i for start, length in slices for i in range(length)]


@pytest.mark.parametrize("balancer", ["headtail", "none"])
def test_the_tokens_of_a_rank_are_those_torchtitan_gives_it(ranks, balancer):
    flags = [
        "--training.seq_len=512",
        "--parallelism.context_parallel_degree=2",
        f"--parallelism.context_parallel_load_balancer={'None' if balancer == 'none' else balancer}",
    ]
    for seen, expected in ranks.run(2, positions, [*TINY, *flags]):
        assert seen == expected
        assert len(seen) == 256


def biases(arguments):
    """Return the bias of three forwards, by layer. Runs on every rank."""
    config = job_config.load(arguments).config
    config.metrics.write_moe_trace = False
    trainer = config.build()
    found = [
        [router.forced_routing.bias_E(torch.tensor(n)).tolist() for n in range(3)]
        for router in routers_of(trainer.model_parts)
    ]
    seeds = [r.forced_routing.own_seed.item() for r in routers_of(trainer.model_parts)]
    trainer.close()
    return found, seeds


@pytest.mark.parametrize("resample", ["every_forward", "once_per_layer"])
def test_bias_is_shared_by_all_ranks(ranks, resample):
    forced = force(f'type = "biased_normal", std = 1.5, resample = "{resample}"')
    flags = ["--parallelism.expert_parallel_degree=2", "--training.local_batch_size=2"]
    by_rank = ranks.run(4, biases, [*TINY, *forced, *flags])
    found = [np.array(bias) for bias, _seeds in by_rank]
    assert all((bias == found[0]).all() for bias in found)
    for layer in found[0]:
        same = (layer[0] == layer[1]).all() and (layer[1] == layer[2]).all()
        assert same == (resample == "once_per_layer")
    for one, other in itertools.combinations(found[0], 2):
        assert (one != other).all(), "layers share a bias"
    assert found[0].std() == pytest.approx(1.5, rel=0.5)
    seeds = [seed for _bias, rank_seeds in by_rank for seed in rank_seeds]
    assert len(set(seeds)) == len(seeds), "ranks or layers share a stream"


def test_biased_normal_prefers_the_biased_experts(ranks, tmp_path):
    """A fixed bias gives every step the same ranking of the experts, as far as groups allow."""
    forced = force('type = "biased_normal", std = 2.0, resample = "once_per_layer"')
    flags = ["--parallelism.expert_parallel_degree=2", "--training.local_batch_size=2"]
    trace, _ = run(ranks, 4, tmp_path, *forced, *flags)
    ((bias, _seeds),) = ranks.run(1, biases, [*TINY, *forced])
    for layer, (first, *_) in enumerate(bias):
        for counts in trace.counts_SME[:, layer]:
            assert np.corrcoef(first, counts)[0, 1] > 0.5
    assert np.corrcoef(*trace.counts_SME.reshape(2, -1))[0, 1] > 0.99


def test_random_balanced_is_balanced_up_to_chance(ranks, tmp_path):
    flags = ["--parallelism.expert_parallel_degree=4", "--training.local_batch_size=2"]
    trace, _ = run(ranks, 4, tmp_path, *force('type = "random_balanced"'), *flags)
    mean, deviation = CHOICES / EXPERTS, (CHOICES / EXPERTS * (1 - TOP_K / EXPERTS)) ** 0.5
    assert (abs(trace.counts_SME - mean) < 5 * deviation).all()
    assert trace.counts_SME.std() > 0.3 * deviation, "not random"
    assert (trace.counts_SME[0] != trace.counts_SME[1]).any(), "the same draw in both steps"


REPLAYS = {
    "one process": (1, []),
    "accumulation": (1, ["--training.local_batch_size=2", "--training.global_batch_size=8"]),
    "cp2": (
        2,
        ["--parallelism.context_parallel_degree=2", "--parallelism.data_parallel_shard_degree=1"],
    ),
    "tp2 ep2 dp2": (
        4,
        [
            "--parallelism.tensor_parallel_degree=2",
            "--parallelism.expert_parallel_degree=2",
            "--training.local_batch_size=4",
        ],
    ),
    "pp2 zbv full ac": (
        2,
        [
            "--parallelism.pipeline_parallel_degree=2",
            "--parallelism.pipeline_parallel_schedule=ZBVZeroBubble",
            "activation-checkpoint:full",
        ],
    ),
}


@pytest.fixture(scope="module")
def recorded(ranks, tmp_path_factory):
    """Run on PP2 x EP2 that records its routing."""
    folder = tmp_path_factory.mktemp("recorded")
    _ep, flags = LAYOUTS["1F1B"]
    record = ["--metrics.record_routing_steps", "1", "2", "--parallelism.expert_parallel_degree=2"]
    long = ["--training.seq_len=256"]
    trace, _ = run(ranks, 4, folder, *record, *flags, *long)
    return folder, trace


@pytest.mark.parametrize("layout", REPLAYS)
def test_replay_is_exact_on_another_layout(ranks, tmp_path, recorded, layout):
    folder, original = recorded
    num_ranks, flags = REPLAYS[layout]
    flags = (
        [*flags[:-1], "--training.seq_len=256", flags[-1]] if flags else ["--training.seq_len=256"]
    )
    record = ["--metrics.record_routing_steps", "1", "2"]
    forced = force(f'type = "replay", trace = "{folder}"')
    trace, _ = run(ranks, num_ranks, tmp_path, *forced, *record, *flags)
    assert (trace.counts_SME == original.counts_SME).all()
    routing, expected = RoutingTrace(tmp_path), RoutingTrace(folder)
    for step, layer in itertools.product((1, 2), LAYERS):
        assert (routing.expert_ids(step, layer) == expected.expert_ids(step, layer)).all()


def opened(arguments):
    """Count how often each trace file is opened, from the flags to the trainer."""
    times = collections.Counter()
    routing_trace._opened.cache_clear()  # what other tests have opened in this process

    class CountingReader(routing_trace.BatchReader):
        def __init__(self, path):
            times[path.name] += 1
            super().__init__(path)

    reader, routing_trace.BatchReader = routing_trace.BatchReader, CountingReader
    try:
        config = job_config.load(arguments).config
        config.metrics.write_moe_trace = False
        config.build().close()
    finally:
        routing_trace.BatchReader = reader
    return times


def test_replay_opens_each_file_once(ranks, recorded):
    flags = [*force(f'type = "replay", trace = "{recorded[0]}/routing"'), "--training.seq_len=256"]
    (times,) = ranks.run(1, opened, [*TINY, *flags])
    assert times == {f"rank_{rank:05d}.arrow": 1 for rank in range(4)}


def pipelined(schedule: str) -> list[str]:
    return [
        *force('type = "biased_normal", std = 1.0'),
        "--parallelism.pipeline_parallel_degree=2",
        f"--parallelism.pipeline_parallel_schedule={schedule}",
        "--debug.seed=3",
    ]


@pytest.fixture(scope="module")
def plain(ranks, tmp_path_factory):
    """Step without recomputation, by schedule."""

    @functools.cache
    def step(schedule):
        folder = tmp_path_factory.mktemp("plain")
        return run(ranks, 2, folder, *pipelined(schedule), "activation-checkpoint:None", steps=1)

    return step


@pytest.mark.parametrize(
    ("schedule", "checkpointing"), [("1F1B", "selective"), ("ZBVZeroBubble", "full")]
)
def test_recomputation_takes_the_same_decisions(ranks, tmp_path, plain, schedule, checkpointing):
    """A recomputed forward with other experts would change the gradient.

    test_recomputation.py compiles forced routing. test_parity.py has this schedule with full
    checkpointing.
    """
    expected, expected_log = plain(schedule)
    recomputed = [*pipelined(schedule), f"activation-checkpoint:{checkpointing}"]
    trace, log = run(ranks, 2, tmp_path, *recomputed, steps=1)
    assert log[0]["grad_norm"] == pytest.approx(expected_log[0]["grad_norm"], rel=1e-6)
    assert (trace.counts_SME == expected.counts_SME).all()


def test_trace_that_does_not_fit_is_refused(recorded):
    folder, _ = recorded
    replay = force(f'type = "replay", trace = "{folder}"')
    with pytest.raises(JobError, match="seq_len 256 and this job has 128"):
        job_config.load([*TINY, *replay])
    other = ["--module", "deepseek_v3", "--config", "deepseek_v3_debugmodel"]
    with pytest.raises(JobError, match="deepseek_v3 debugmodel .* is of deepseek_v3 tiny"):
        job_config.load([*other, *replay])
    missing = force(f'type = "replay", trace = "{folder}", steps = [7]')
    with pytest.raises(JobError, match="step 7"):
        job_config.load([*TINY, "--training.seq_len=256", *missing])
