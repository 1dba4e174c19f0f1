"""Tests of workloads W0 to W7: each strategy has the promised counts, the same in every layout."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from tests.balancing.test_forced_routing import CHOICES, LAYERS, TINY, force, run
from tests.support.train_jobs import train
from titan_moe_lb.balancing.forced_routing import (
    Burst,
    HotExperts,
    HotRank,
    Ragged,
    Rotating,
    RoundRobin,
    ZeroLoad,
)
from titan_moe_lb.balancing.forced_routing.functional import (
    even_order,
    ragged_rows,
    round_robin_ids,
)
from titan_moe_lb.parallel.rank_groups import Axis, RankGroups
from titan_moe_lb.traces.routing_trace import RoutingTrace
from titan_moe_lb.traces.trace import read_trace


def divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


# ---- Round robin and the ranks


@pytest.mark.parametrize("num_experts", [1, 2, 6, 8, 12, 16])
def test_round_robin_leaves_no_rank_idle(num_experts):
    """For any number of tokens, any start, every K and every EP degree, each rank gets tokens."""
    rank_counts = itertools.product(range(1, num_experts + 1), divisors(num_experts))
    for top_k, ep in rank_counts:
        config = RoundRobin.Config(num_experts=num_experts, top_k=top_k, expert_parallel=ep)
        strategy = config.build()
        for first, num_tokens in itertools.product(range(num_experts), range(1, 20)):
            tokens = torch.arange(first, first + num_tokens)
            ids = strategy.deal(tokens, 100, torch.tensor(0)).numpy()
            assert all(len(set(row)) == top_k for row in ids.tolist())
            experts = np.bincount(ids.ravel(), minlength=num_experts)
            of_ranks = experts.reshape(ep, -1).sum(axis=1)
            where = (top_k, ep, first, num_tokens)
            assert np.ptp(experts) <= 1, where
            assert np.ptp(of_ranks) <= 1, where
            assert (of_ranks > 0).sum() == min(ep, num_tokens * top_k), where


def test_one_token_a_rank():
    """The reversed digits of 16 experts are 0, 8, 4, 12, 2, ..., on ranks 0, 4, 2, 6, 1, ..."""
    config = RoundRobin.Config(num_experts=16, top_k=2, expert_parallel=8)
    ids = config.build().deal(torch.arange(8), 8, torch.tensor(0))
    assert ids[:4].tolist() == [[0, 8], [4, 12], [2, 10], [6, 14]]
    assert (ids // 2).unique().tolist() == list(range(8))


# (E, K, groups, groups that are open) of DeepSeek-V3, DeepSeek-V2, and of tests.
LIMITED = [(256, 8, 8, 4), (160, 6, 8, 3), (8, 2, 4, 2), (8, 2, 4, 1)]


@pytest.mark.parametrize(("num_experts", "top_k", "groups", "open_groups"), LIMITED)
def test_round_robin_under_a_group_limit(num_experts, top_k, groups, open_groups):
    """One token from each EP rank reaches all ranks, and not too many groups."""
    for ep in (1, 2, 4, 8):
        order = torch.tensor(even_order(num_experts, top_k, ep, open_groups))
        ids = order[round_robin_ids(torch.arange(num_experts), top_k, num_experts)]
        reached = [len(set(row)) for row in (ids // (num_experts // groups)).tolist()]
        assert max(reached) <= open_groups
        for first in range(num_experts - ep):
            ranks = ids[first : first + ep] // (num_experts // ep)
            assert ranks.unique().numel() == ep, (ep, first)


def test_order_does_not_depend_on_a_degree_that_is_a_power_of_two():
    orders = [even_order(160, 6, ep) for ep in (1, 2, 4, 8, 16, 32)]
    assert all(order == orders[0] for order in orders)


# ---- Every strategy, cut in every way

# 2 x 3 x 5 x 8 tokens a step: none of the cuts divides evenly by the experts.
STEP_TOKENS = 240
EXPERTS, TOP_K = 7, 3
# (data-parallel ranks, EP degree, micro-batches): EP divides ranks; experts need not fit it here.
CUTS = [(1, 1, 1), (1, 1, 8), (2, 1, 3), (4, 4, 5), (6, 2, 1), (8, 4, 5), (2, 2, 120)]


def in_turn(total: int, experts: list[int]) -> Counter:
    """Deal tokens in turn; the first experts get the remainder."""
    share, more = divmod(total, len(experts))
    return Counter({e: share + (i < more) for i, e in enumerate(experts)})


def hot_and_cold(fraction: float, hot: list[int]) -> list[int]:
    num_hot = round(fraction * STEP_TOKENS * TOP_K)
    cold = [e for e in range(EXPERTS) if e not in hot]
    counts = in_turn(num_hot, hot) + in_turn(STEP_TOKENS * TOP_K - num_hot, cold)
    return [counts[e] for e in range(EXPERTS)]


EVEN = [103, 103, 103, 103, 103, 103, 102]  # 720 choices of 7 experts
# Strategy, and by step its counts.
WORKLOADS = {
    "W0": (RoundRobin.Config(), [EVEN]),
    "W1": (HotExperts.Config(num_hot=3, fraction=0.695), [hot_and_cold(0.695, [0, 1, 2])]),
    "W2": (HotRank.Config(rank=3, fraction=0.25, expert_parallel=7), [hot_and_cold(0.25, [3])]),
    "W3": (
        HotExperts.Config(num_hot=3, fraction=0.695, placement="spread"),
        [hot_and_cold(0.695, [0, 2, 4])],
    ),
    "W4": (Ragged.Config(fraction=0.6), [EVEN]),
    "W5": (ZeroLoad.Config(num_zero=2), [[0, 0, 144, 144, 144, 144, 144]]),
    "W5 spread": (
        ZeroLoad.Config(num_zero=2, placement="spread"),
        [[0, 144, 144, 0, 144, 144, 144]],
    ),
    # 432 choices of 2 hot experts, 288 of the others.
    "W6": (
        Rotating.Config(num_hot=2, fraction=0.6, period=2),
        [
            np.roll(hot_and_cold(0.6, [0, 1]), shift).tolist()
            for shift in (0, 0, 2, 2, 4, 4, 6, 6, 1)
        ],
    ),
    "W7": (
        Burst.Config(num_hot=3, fraction=0.695, period=3),
        [EVEN, EVEN, hot_and_cold(0.695, [0, 1, 2]), EVEN, EVEN, hot_and_cold(0.695, [0, 1, 2])],
    ),
}


def dispatches(config, cut, step) -> np.ndarray:
    """Counts ``(dispatches of a step, E)`` of the ranks of a job."""
    num_ranks, ep, num_micro_batches = cut
    config.num_experts, config.top_k = EXPERTS, TOP_K
    config.num_micro_batches = num_micro_batches
    length = STEP_TOKENS // num_ranks // num_micro_batches
    counts = np.zeros((num_micro_batches, num_ranks // ep, EXPERTS), dtype=int)
    for rank in range(num_ranks):
        strategy = config.build()
        groups = RankGroups(loss=Axis(rank, num_ranks), experts=Axis(size=ep))
        strategy.wire(groups, layer=1)
        for micro_batch in range(num_micro_batches):
            number = torch.tensor(step * num_micro_batches + micro_batch)
            ids = strategy(torch.zeros(1, length, EXPERTS), number, lambda scores: scores)
            assert ids.shape == (1, length, TOP_K)
            assert all(len(set(row)) == TOP_K for row in ids[0].tolist())
            counts[micro_batch, rank // ep] += np.bincount(ids.numpy().ravel(), minlength=EXPERTS)
    return counts.reshape(-1, EXPERTS)


@pytest.mark.parametrize("name", WORKLOADS)
def test_counts_of_a_step_are_the_same_in_every_cut(name):
    config, by_step = WORKLOADS[name]
    for step, expected in enumerate(by_step):
        for cut in CUTS if step == len(by_step) - 1 else CUTS[-1:]:
            counts = dispatches(config, cut, step)
            assert counts.sum(axis=0).tolist() == expected, (cut, step)
            # Each dispatch has its part of them: hot share and evenness to within one token.
            hot = np.array(expected) > max(EVEN)
            share = np.array(expected)[hot].sum() / sum(expected)
            off = counts[:, hot].sum(axis=1) - counts.sum(axis=1) * share
            assert (abs(off) < 1).all(), (cut, step)
            for kind in (hot, ~hot & (np.array(expected) > 0)):
                if kind.any():
                    assert (np.ptp(counts[:, kind], axis=1) <= 1).all(), (cut, step)


@pytest.mark.parametrize("name", WORKLOADS)
def test_operators_alone_make_a_step(name):
    """The operators of forward 0, run again as by a CUDA graph, deal as forward 11 does."""
    config, _ = WORKLOADS[name]
    config.num_experts, config.top_k, config.num_micro_batches = EXPERTS, TOP_K, 2
    strategy, scores = config.build(), torch.zeros(1, 19, EXPERTS)

    def deal(number):
        return strategy(scores, number, lambda scores: scores)

    captured = make_fx(deal)(torch.tensor(0))
    assert torch.equal(captured(torch.tensor(11)), deal(torch.tensor(11)))
    assert not torch.equal(captured(torch.tensor(11)), captured(torch.tensor(0)))


# ---- Ragged sources


@given(st.data())
@settings(max_examples=200)
def test_ragged_exchanges_tokens_of_a_dispatch(data):
    """Every row of the deal occurs once, so the counts equal those of round robin."""
    num_experts = data.draw(st.integers(1, 24))
    top_k = data.draw(st.integers(1, num_experts))
    dispatched = data.draw(st.integers(1, 60))
    rows = ragged_rows(
        torch.arange(3 * dispatched),
        top_k,
        num_experts,
        fraction=data.draw(st.floats(0.01, 1)),
        distance=data.draw(st.floats(0, 0.99)),
        dispatched_tokens=dispatched,
    ).reshape(3, -1)
    expected = torch.arange(3 * dispatched).reshape(3, -1)
    assert torch.equal(rows.sort(dim=1).values, expected)


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_ragged_sources_send_to_one_rank(num_ranks):
    """The workload is the same at any EP degree: ragged tokens go half way round, or home."""
    tokens, num_experts, top_k = 256, 16, 2
    for fraction, distance in itertools.product((0.25, 0.75, 1.0), (0.0, 0.5)):
        config = Ragged.Config(
            num_experts=num_experts, top_k=top_k, fraction=fraction, distance=distance
        )
        ids = config.build().deal(torch.arange(tokens), tokens, torch.tensor(0)).numpy()
        source = np.arange(tokens) // (tokens // num_ranks)
        sent = np.zeros((num_ranks, num_ranks), dtype=int)
        np.add.at(sent, (source[:, None], ids // (num_experts // num_ranks)), 1)
        # Of each source: the rest evenly to all, the ragged part to one.
        of_source = tokens * top_k // num_ranks
        expected = np.full(sent.shape, of_source * (1 - fraction) / num_ranks)
        for rank in range(num_ranks):
            expected[rank, int(rank + distance * num_ranks) % num_ranks] += of_source * fraction
        assert (sent == expected).all(), (fraction, distance)


def test_ragged_begins_anew_in_every_dispatch():
    """28 tokens, top 1 of 6 experts: four rounds are sorted from expert 3 on; rows 24 to 27 stay as
    dealt."""
    config = Ragged.Config(num_experts=6, top_k=1, fraction=1.0, num_micro_batches=2)
    ids = config.build().deal(torch.arange(56), 56, torch.tensor(0)).flatten().tolist()
    ring = [expert for expert in (3, 4, 5, 0, 1, 2) for _ in range(4)]
    assert ids[:28] == [*ring, 0, 1, 2, 3]
    # Rows 52 to 55 of the deal of the global batch.
    assert ids[28:] == [*ring, 4, 5, 0, 1]


# ---- On real ranks

EP2 = ["--parallelism.expert_parallel_degree=2", "--training.local_batch_size=4"]
PP2_EP2 = [
    *EP2,
    "--parallelism.pipeline_parallel_degree=2",
    "--parallelism.pipeline_parallel_schedule=ZBVZeroBubble",
]


def test_rotating_on_pipeline_and_expert_parallel_ranks(ranks, tmp_path):
    """3/4 of 2,048 choices go to three experts, and from step 4 on to the next three: 512 each."""
    forced = force('type = "rotating", num_hot = 3, fraction = 0.75, period = 1')
    trace, _ = run(ranks, 4, tmp_path, *forced, *PP2_EP2, steps=4)
    # 512 choices of 5 cold experts: 103, 103, 102, 102, 102.
    first = [512, 512, 512, 103, 103, 102, 102, 102]
    for step, counts in enumerate(trace.counts_SME):
        assert (counts == np.roll(first, 3 * step)).all(), step


def test_burst_under_full_checkpointing(ranks, tmp_path):
    """The bursts of steps 2 and 4 hit experts 0 and 4, one on each rank, so no rank is hot."""
    table = 'type = "burst", num_hot = 2, fraction = 0.75, placement = "spread", period = 2'
    trace, logged = run(
        ranks, 2, tmp_path, *force(table), *EP2, "activation-checkpoint:full", steps=4
    )
    cold = [86, 86, 85, 85, 85, 85]  # 512 choices
    burst = [768, *cold[:3], 768, *cold[3:]]
    for step, expected in enumerate([[256] * 8, burst, [256] * 8, burst]):
        assert (trace.counts_SME[step] == expected).all(), step
    # Rank 0: 768 + 86 + 86 + 85 of 2,048, and 2 ranks.
    factors = [row["moe/max_overload_factor"] for row in logged]
    assert factors == pytest.approx([1, 1025 / 1024, 1, 1025 / 1024])


DATA_PARALLEL = ["--training.local_batch_size=1", "--training.global_batch_size=8"]


@pytest.mark.parametrize(
    ("num_ranks", "flags"),
    [(1, []), (2, DATA_PARALLEL), (4, PP2_EP2)],
    ids=["one process", "dp2 accumulation 4", "pp2 ep2 zbv"],
)
def test_zero_load_is_the_same_in_every_layout(ranks, tmp_path, num_ranks, flags):
    """Three experts get the 2,048 choices: 683, 683 and 682. Rank 0 of EP 2 has none of them."""
    forced = force('type = "zero_load", num_zero = 5')
    trace, logged = run(ranks, num_ranks, tmp_path, *forced, *flags, steps=1)
    assert (trace.counts_SME == [0, 0, 0, 0, 0, 683, 683, 682]).all()
    if flags is PP2_EP2:
        assert logged[0]["moe/max_overload_factor"] == 2


def test_ragged_on_expert_parallel_ranks(ranks, tmp_path):
    """Half of a rank's 1,024 choices go to the other rank, the rest evenly to both."""
    forced = force('type = "ragged", fraction = 0.5')
    record = ["--metrics.record_routing_steps", "1"]
    trace, _ = run(ranks, 2, tmp_path, *forced, *EP2, *record, steps=1)
    assert (trace.counts_SME == CHOICES // 8).all()
    routing = RoutingTrace(tmp_path)
    for layer in LAYERS:
        ranks_of = routing.expert_ids(1, layer).reshape(2, -1) // 4  # 4 sequences a rank
        sent = [np.bincount(row, minlength=2).tolist() for row in ranks_of]
        assert sent == [[256, 768], [768, 256]]


def test_a_resumed_job_goes_on_with_its_step(ranks, tmp_path):
    """After a checkpoint of step 2, step 3 uses experts 4 and 5, and step 4 uses 6 and 7."""
    forced = force('type = "rotating", num_hot = 2, fraction = 1.0, period = 1')
    checkpoints = ["--checkpoint.enable", "--checkpoint.interval=2"]
    checkpoints += ["--checkpoint.no-last-save-model-only", "--training.seq_len=64"]
    flags = [*TINY, *forced, *checkpoints, f"--dump_folder={tmp_path}"]
    ranks.run(1, train, [*flags, "--training.steps=2"])
    ranks.run(1, train, [*flags, "--training.steps=4"], first_step=3)
    trace = read_trace(tmp_path)
    for step, hot in zip((3, 4), ([4, 5], [6, 7]), strict=True):
        (counts,) = trace.counts_SME[trace.steps == step, 0]
        assert np.flatnonzero(counts).tolist() == hot
