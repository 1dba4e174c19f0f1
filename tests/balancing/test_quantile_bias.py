"""Tests of the quantile rules, against quantiles by sorting and against every possible bias."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.bias_steps import built, step_of
from tests.support.telemetry_jobs import moe_layers
from tests.support.textbook import SCORES
from titan_moe_lb.balancing.expert_bias import BiasStep, QuantileBias, QuantileTrendBias
from titan_moe_lb.balancing.expert_bias.required import required_bias
from titan_moe_lb.balancing.step_hook import StepHook, wire
from titan_moe_lb.parallel.rank_groups import RankGroups


def required_of(scores_TE, bias_E, groups: int, limit: int, top_k: int) -> np.ndarray:
    """Bias that each token requires of each expert, from the package ``(T, E)``."""
    limits = (groups, limit) if groups > 1 else (None, None)
    runner_up_T1 = np.sort(_limited(scores_TE + bias_E, groups, limit), axis=1)[:, [-top_k - 1]]
    tables = map(torch.from_numpy, (scores_TE, scores_TE + bias_E, runner_up_T1))
    return required_bias(*tables, num_groups=limits[0], num_limited_groups=limits[1]).numpy()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_quantile_against_sorting(data):
    """The new bias is the K/E quantile of the required biases, to within one bin."""
    groups = data.draw(st.sampled_from([1, 2, 4]), "groups")
    num_experts = groups * data.draw(st.integers(2, 6), "experts of a group")
    limit = data.draw(st.integers(1, groups), "groups of a token")
    top_k = data.draw(st.integers(1, limit * (num_experts // groups)), "K")
    num_tokens = data.draw(st.integers(1, 60), "tokens")
    seed = data.draw(st.integers(0, 10**6), "seed")
    random = np.random.default_rng(seed)
    scores = random.random((num_tokens, num_experts)).astype(np.float32)
    if data.draw(st.booleans(), "ties"):
        scores = scores.round(1)
    if data.draw(st.booleans(), "an expert nobody likes"):
        scores[:, 0] = 0
    bias = (random.standard_normal(num_experts) / 4).astype(np.float32)
    num_bins = data.draw(st.sampled_from([10, 1000]), "bins")
    valid = random.random(num_tokens) < 0.7
    valid[0] = True

    rule = built(QuantileBias.Config(num_bins=num_bins), num_experts, top_k)
    if top_k == num_experts:
        assert rule.num_bins == 0
        assert not rule.delta(step_of(torch.ones(1, num_experts))).any()
        return
    required = required_of(scores, bias, groups, limit, top_k)

    histogram = torch.zeros(num_experts, num_bins, dtype=torch.int32)
    rule.observe(
        histogram,
        torch.from_numpy(required).view(1, num_tokens, num_experts),
        torch.from_numpy(bias),
        torch.from_numpy(valid).view(1, -1, 1).int(),
    )
    assert (histogram.sum(dim=1) == valid.sum()).all()
    step = BiasStep(
        torch.from_numpy(bias)[None], torch.ones(1, num_experts), histogram[None].long()
    )
    found = (step.bias_NE + rule.delta(step))[0].double().numpy()
    begins, ends = np.zeros(num_experts), np.zeros(num_experts)

    # The least value that at least K/E of the tokens require at most.
    rank = int(np.ceil(valid.sum() * top_k / num_experts - 1e-9)) - 1
    exact = np.sort(required[valid], axis=0)[rank].astype(np.float64)
    for expert in range(num_experts):
        edges = bin_edges(bias, expert, num_bins)
        exact[expert] = exact[expert].clip(edges[0], edges[-1])
        bin_of = np.searchsorted(edges, exact[expert], side="right") - 1
        # A value within rounding of an edge may be counted on its other side.
        begins[expert] = (
            edges[max(bin_of - 1, 0)] if exact[expert] - edges[bin_of] < 1e-6 else edges[bin_of]
        )
        after = min(bin_of + 1, num_bins)
        ends[expert] = (
            edges[min(after + 1, num_bins)] if edges[after] - exact[expert] < 1e-6 else edges[after]
        )
    # Each in the bin of its exact quantile, up to one constant for all: the mean taken off.
    assert (begins - found).max() <= (ends - found).min() + 1e-6
    assert abs(found.mean()) < 1e-6


def bin_edges(bias: np.ndarray, expert: int, num_bins: int) -> np.ndarray:
    span = float(bias.max() - bias.min()) + 2
    middle = num_bins // 2 + 0.5
    places = (np.arange(num_bins + 1) - middle) * 2 / (num_bins - 1)
    return float(bias[expert]) + 1e-3 * np.sinh(places * np.arcsinh(span / 1e-3))


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_required_bias_by_trying_every_bias(data):
    """The required bias of an expert equals the one found by bisection.

    The bias of a selected expert may fall until another expert of the token's groups, or another
    group, takes its place. An expert that is not selected requires at least its own bias.
    """
    groups = data.draw(st.sampled_from([1, 2, 4]), "groups")
    size = data.draw(st.integers(2, 4), "experts of a group")
    limit = data.draw(st.integers(1, groups), "groups of a token")
    top_k = data.draw(st.integers(1, min(limit * size, groups * size - 1)), "K")
    random = np.random.default_rng(data.draw(st.integers(0, 10**6), "seed"))
    scores = random.random((1, groups * size)).astype(np.float32)
    bias = (random.standard_normal(groups * size) / 4).astype(np.float32)
    reached = _limited(scores + bias, groups, limit)[0]
    required = required_of(scores, bias, groups, limit, top_k)[0]

    def is_in_the_best(expert: int, fall: float) -> bool:
        choice = reached.astype(np.float64)
        choice[expert] -= fall
        return bool((choice > choice[expert]).sum() < top_k)

    def is_reached(expert: int, fall: float) -> bool:
        choice = (scores + bias).astype(np.float64)
        first = expert // size * size
        choice[0, first : first + size] -= fall
        return bool(_limited(choice, groups, limit)[0, expert] > -np.inf)

    for expert in range(groups * size):
        if not (is_in_the_best(expert, 0) and is_reached(expert, 0)):
            assert required[expert] >= bias[expert] - 1e-6
            continue
        falls = [
            _bisected(lambda fall, holds=holds, expert=expert: holds(expert, fall))
            for holds in (is_in_the_best, is_reached)
        ]
        assert required[expert] == pytest.approx(bias[expert] - min(falls), abs=1e-5)


def _bisected(holds: Callable[[float], bool]) -> float:
    """Find the largest number from 0 on for which a condition holds, to 1e-9; infinite if it always
    holds."""
    low, high = 0.0, 10.0
    if holds(high):
        return np.inf
    for _ in range(34):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _limited(choice: np.ndarray, groups: int, limit: int) -> np.ndarray:
    """Group-limited routing: keep the groups with the largest sums of their two best experts."""
    grouped = choice.reshape(len(choice), groups, -1)
    best_two = np.sort(grouped, axis=-1)[..., -2:].sum(axis=-1)
    out = np.argsort(-best_two, axis=1, kind="stable")[:, limit:]
    limited = grouped.copy()
    for token, left_out in enumerate(out):
        limited[token, left_out] = -np.inf
    return limited.reshape(choice.shape)


def test_ema_keeps_a_share_of_the_bias():
    bias = torch.tensor([[0.3, -0.3]])
    step = BiasStep(bias, torch.tensor([[4, 4]]), asking(bias, 0.2))
    for ema in (0.0, 0.9):
        delta = built(QuantileBias.Config(ema=ema), 2, 1).delta(step)
        expected = ema * 0.3 + (1 - ema) * 0.1
        assert (bias + delta).tolist()[0] == pytest.approx([expected, -expected], abs=2e-3)


@pytest.mark.parametrize(
    ("score", "num_experts", "top_k"),
    [("sigmoid", 64, 4), ("softmax", 64, 4), ("softmax", 256, 8), ("sqrtsoftplus", 64, 4)],
)
def test_balances_as_sorting_does(score, num_experts, top_k):
    """After ten steps on one distribution of tokens, MaxVio is within 0.03 of that with exact
    quantiles.

    With a softmax over 256 experts, uniform bins leave a MaxVio of 1.9.
    """
    generator = torch.Generator().manual_seed(0)
    num_tokens = 4096
    logits = torch.randn(num_tokens, num_experts, generator=generator)
    logits += torch.randn(num_experts, generator=generator)
    if score == "sqrtsoftplus":
        logits = 6 * logits + 10  # scores of 0 to 6
    scores = SCORES[score](logits)
    rule = built(QuantileBias.Config(), num_experts, top_k, score)
    violations = {}
    for how in ("histogram", "sorting"):
        bias = torch.zeros(num_experts)
        for _ in range(10):
            best, ids = (scores + bias).topk(top_k + 1, dim=-1)
            required = best[:, -1:] - scores
            counts = torch.bincount(ids[:, :top_k].flatten(), minlength=num_experts)
            if how == "sorting":
                rank = num_tokens * top_k // num_experts
                bias = required.sort(dim=0).values[rank - 1 : rank + 1].mean(dim=0)
                bias -= bias.mean()
            else:
                histogram = torch.zeros(num_experts, rule.num_bins, dtype=torch.int32)
                rule.observe(
                    histogram, required.unsqueeze(0), bias, torch.ones((), dtype=torch.int32)
                )
                bias += rule.delta(BiasStep(bias[None], counts[None], histogram[None].long()))[0]
        violations[how] = float(counts.max() / counts.float().mean() - 1)
    assert violations["sorting"] < 0.05
    assert violations["histogram"] < violations["sorting"] + 0.03, violations


def limits_of(num_experts: int, *, every_top_k: bool) -> list[dict]:
    """Yield every number of groups and of reachable groups, with each K or the outermost ones."""
    kinds = []
    for groups in (1, 2, 4, 8):
        for limit in range(1, groups + 1) if num_experts // groups >= 2 else ():
            most = min(limit * (num_experts // groups), num_experts - 1)
            top_ks = range(1, most + 1) if every_top_k else sorted({1, most // 2, most} - {0})
            kinds += [
                {"num_experts": num_experts, "groups": (groups, limit), "top_k": top_k}
                for top_k in top_ks
            ]
    return kinds


@pytest.mark.parametrize(
    ("rule", "num_experts"), [("quantile", 8), ("quantile_trend", 8), ("quantile", 16)]
)
def test_quantiles_balance_under_every_group_limit(rule, num_experts):
    """Routers of every limit balance fixed tokens that prefer different experts."""
    kinds = limits_of(num_experts, every_top_k=num_experts == 8)
    layers = moe_layers(list(range(len(kinds))), [], expert_bias=rule, kinds=kinds)
    hook = StepHook(layers, wire([layer.router for layer in layers], RankGroups()), RankGroups())
    generator = torch.Generator().manual_seed(0)
    x_BLD = (torch.randn(4, 256, 64, generator=generator) + 0.5) / 8
    violations = []
    for _step in range(60):
        for layer in layers:
            layer.router(x_BLD, layer.expert_bias_E)
        hook.close_step()
        counts_NE = layers[0].router.step_record.sums.counts_NSE[:, 0]
        violations.append(counts_NE.amax(dim=1) / counts_NE.double().mean(dim=1) - 1)
    assert violations[0].median() > 0.3
    # Bound of the last five steps: they rest, and do not swing.
    worst = torch.stack(violations[-5:]).amax(dim=0)
    assert {str(kind): float(v) for kind, v in zip(kinds, worst, strict=True) if v > 0.1} == {}


def test_trend_goes_on_where_the_quantiles_go():
    """If one expert's quantile rises by 0.1 in every step, the trend rule catches up after some
    steps.

    The bias of ``quantile`` stays one step late.
    """
    late, ahead = (
        built(config, 2, 1)
        for config in (QuantileBias.Config(), QuantileTrendBias.Config(trend_ema=0.5))
    )
    late_error, ahead_error, state = 0.0, 0.0, {"trend_E": torch.zeros(1, 2)}
    biases = {"late": torch.zeros(1, 2), "ahead": torch.zeros(1, 2)}
    for number in range(1, 12):
        asked = 0.1 * number
        late_error = asked - float(biases["late"][0, 0] - biases["late"][0, 1])
        ahead_error = asked - float(biases["ahead"][0, 0] - biases["ahead"][0, 1])
        for name, rule in (("late", late), ("ahead", ahead)):
            bias = biases[name]
            step = BiasStep(bias, torch.tensor([[4, 4]]), asking(bias, asked), state)
            biases[name] = bias + rule.delta(step)
    assert late_error == pytest.approx(0.1, abs=0.01)
    assert abs(ahead_error) < 0.01


def asking(bias: torch.Tensor, difference: float, num_bins: int = 1000) -> torch.Tensor:
    """Histogram of ten tokens that all require ``difference`` more of expert 0 than of expert 1."""
    histogram = torch.zeros(1, 2, num_bins, dtype=torch.int64)
    for expert, required in ((0, difference / 2), (1, -difference / 2)):
        edges = bin_edges(bias[0].numpy(), expert, num_bins)
        histogram[0, expert, np.searchsorted(edges, required) - 1] = 10
    return histogram


def test_a_score_that_is_no_number_leaves_the_quantile_where_it_is():
    """If every token has NaN, the quantile is in the middle bin, within 1e-4 of the bias."""
    rule = built(QuantileBias.Config(num_bins=1001), 2, 1)
    bias_E = torch.tensor([0.1, -0.1])
    histogram_EH = torch.zeros(2, 1001, dtype=torch.int32)
    required_BLE = torch.full((1, 10, 2), torch.nan)
    rule.observe(histogram_EH, required_BLE, bias_E, torch.ones((), dtype=torch.int32))
    step = BiasStep(bias_E[None], torch.tensor([[5, 5]]), histogram_EH[None].long())
    assert rule.move(step).abs().max() < 1e-4
