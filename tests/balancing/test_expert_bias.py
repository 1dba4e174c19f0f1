"""Tests of the bias rules: values derived by hand, and finite states under any counts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.bias_steps import built, step_of
from titan_moe_lb.balancing.expert_bias import (
    BiasStep,
    ExpertBias,
    MomentumBias,
    ProportionalBias,
    QuantileBias,
    QuantileTrendBias,
    SignBias,
)
from titan_moe_lb.errors import JobError

COUNTS = torch.tensor([[4, 10, 1, 1]])  # mean 4, sum 16


def test_sign_by_hand():
    """The signs of the deviations are 0, -1, +1, +1; the rule subtracts their mean, 0.25."""
    delta = built(SignBias.Config(speed=0.1)).delta(step_of(COUNTS))
    assert delta[0].tolist() == pytest.approx([-0.025, -0.125, 0.075, 0.075])


def test_proportional_by_hand():
    """The bias of an expert moves by 1/4 minus its share: 4/16, 10/16, 1/16, 1/16."""
    delta = built(ProportionalBias.Config(speed=0.8)).delta(step_of(COUNTS))
    assert delta[0].tolist() == pytest.approx([0.0, -0.3, 0.15, 0.15])


def test_momentum_by_hand():
    """The violations are 0, -1.5, 0.75, 0.75; the second step is half of the first and half of its
    own."""
    rule = built(MomentumBias.Config(speed=0.1, scale=2.0, momentum=0.5))
    momentum = torch.zeros(1, 4)
    clamped = np.tanh(2 * np.array([0.0, -1.5, 0.75, 0.75])) * 0.1
    centered = clamped - clamped.mean()
    first = rule.delta(step_of(COUNTS, state={"momentum_E": momentum}))
    assert first[0].tolist() == pytest.approx(centered / 2)
    second = rule.delta(step_of(COUNTS, state={"momentum_E": momentum}))
    assert second[0].tolist() == pytest.approx(centered * 0.75)
    assert momentum[0].tolist() == pytest.approx(centered * 0.75)
    assert list(dict(rule.named_buffers())) == list(rule.state_dict()) == ["momentum_E"]


def test_rules_rest_at_balance():
    even = torch.full((2, 4), 7)
    for config in (SignBias.Config(), ProportionalBias.Config(speed=1.0), MomentumBias.Config()):
        rule = built(config)
        state = {name: torch.zeros(2, 4) for name in rule.state_names}
        assert not rule.delta(step_of(even, state=state)).any()


class Diverging(ExpertBias):
    """A custom rule that divides by the number of tokens."""

    state_names = ("shares_E",)

    @dataclass(kw_only=True, slots=True)
    class Config(ExpertBias.Config):
        pass

    def delta(self, step: BiasStep) -> torch.Tensor:
        shares_NE = step.counts_NE / step.counts_NE.sum(dim=-1, keepdim=True)
        return step.state["shares_E"].copy_(shares_NE)


STEPPING = (
    SignBias.Config(speed=0.1),
    ProportionalBias.Config(speed=1.0),
    MomentumBias.Config(speed=0.1),
    QuantileBias.Config(num_bins=20, ema=0.5),
    QuantileTrendBias.Config(num_bins=20),
    Diverging.Config(),
)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("config", STEPPING, ids=lambda config: config._owner.__name__)
def test_states_are_finite_under_any_counts(config, data):
    """A layer that routes nothing in a step keeps its bias and state."""
    num_experts, top_k = 4, 2
    rule = built(config, num_experts, top_k)
    bias_NE = torch.zeros(2, num_experts)
    state = {name: torch.zeros(2, num_experts) for name in rule.state_names}
    token = st.lists(st.integers(0, num_experts - 1), min_size=top_k, max_size=top_k, unique=True)
    for _step in range(data.draw(st.integers(1, 6), "steps")):
        counts_NE = torch.zeros(2, num_experts, dtype=torch.int64)
        histogram_NEH = torch.zeros(2, num_experts, max(1, rule.num_bins), dtype=torch.int64)
        for layer in range(2):
            for ids in data.draw(st.lists(token, max_size=4), "tokens"):
                alike = data.draw(st.sampled_from([1, 3, 2**24 + 1, 2**45 + 1]), "tokens alike")
                counts_NE[layer, ids] += alike
                for expert in range(num_experts):
                    place = data.draw(st.integers(0, max(0, rule.num_bins - 1)), "bin")
                    histogram_NEH[layer, expert, place] += alike
        before = [bias_NE.clone(), *(table.clone() for table in state.values())]
        step = BiasStep(bias_NE, counts_NE, histogram_NEH if rule.num_bins else None, dict(state))
        bias_NE = bias_NE + rule.move(step)
        state = step.state
        for table, old in zip([bias_NE, *state.values()], before, strict=True):
            assert table.isfinite().all()
            empty = counts_NE.sum(dim=1) == 0
            assert torch.equal(table[empty], old[empty])


@given(st.lists(st.integers(0, 2**53), min_size=2, max_size=8))
def test_sign_is_that_of_the_integers(counts):
    """float32 rounds 2**24 + 1 to 2**24; the reference uses Python integers."""
    rule = built(SignBias.Config(speed=1.0), len(counts), 1)
    delta = rule.move(step_of(torch.tensor([counts])))[0].double().numpy()
    missing = [sum(counts) - len(counts) * count for count in counts]
    signs = np.array([(less > 0) - (less < 0) for less in missing])
    np.testing.assert_allclose(delta, signs - signs.mean(), atol=1e-6)


@pytest.mark.parametrize(
    ("rule", "key", "value"),
    [
        (QuantileBias, "num_bins", 0),
        (QuantileBias, "ema", 1.0),
        (QuantileTrendBias, "trend_ema", 1.0),
        (MomentumBias, "momentum", 1.0),
        (MomentumBias, "scale", 0.0),
        (ProportionalBias, "speed", 0.0),
    ],
)
def test_a_value_without_meaning_is_refused(rule, key, value):
    with pytest.raises(JobError, match=key):
        rule.Config(**{key: value})
