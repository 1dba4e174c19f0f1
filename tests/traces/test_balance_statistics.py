"""Tests of the balance statistics, against exact rationals and closed forms."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from titan_moe_lb.traces import balance_statistics

COUNTS = st.lists(st.integers(0, 10**6), min_size=1, max_size=40)


@given(COUNTS)
def test_against_the_textbook_in_rationals(counts):
    array = np.array(counts, dtype=np.int64)
    mean = Fraction(sum(counts), len(counts))
    if mean:
        variance = sum((count - mean) ** 2 for count in counts) / len(counts)
        shares = [Fraction(count, sum(counts)) for count in counts if count]
        entropy = -math.fsum(float(share) * math.log(share) for share in shares)
        expected = (
            float(max(counts) / mean - 1),
            math.sqrt(variance / mean**2),
            entropy / math.log(len(counts)) if len(counts) > 1 else 1.0,
        )
    else:
        expected = (0.0, 0.0, 1.0)
    found = (
        balance_statistics.max_violation(array),
        balance_statistics.coefficient_of_variation(array),
        balance_statistics.normalized_entropy(array),
    )
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert balance_statistics.num_dead_experts(array) == counts.count(0)


@pytest.mark.parametrize("num_experts, top_k", [(8, 2), (256, 8), (16, 1)])
def test_worst_case_is_the_documented_one(num_experts, top_k):
    counts_ME = np.zeros((3, num_experts), dtype=np.int64)
    counts_ME[1, :top_k] = 1000
    counts_ME[2] = 7
    ratio = num_experts / top_k
    check = {
        balance_statistics.max_violation: [0, ratio - 1, 0],
        balance_statistics.coefficient_of_variation: [0, math.sqrt(ratio - 1), 0],
        balance_statistics.normalized_entropy: [1, math.log(top_k) / math.log(num_experts), 1],
        balance_statistics.num_dead_experts: [num_experts, num_experts - top_k, 0],
    }
    for function, expected_M in check.items():
        assert function(counts_ME) == pytest.approx(expected_M), function.__name__
    load_ME = balance_statistics.relative_load(counts_ME)
    assert load_ME[1].max() == ratio and (load_ME[0] == 1).all() and (load_ME[2] == 1).all()


@given(COUNTS, st.integers(1, 5))
def test_experts_that_a_layer_lacks_are_not_counted(counts, more):
    """Beside a layer with more experts, its statistics are the same as alone."""
    alone = np.array([counts])
    both = np.array([counts + [7] * more, [5] * (len(counts) + more)])
    marked = balance_statistics.mark_absent(both, np.array([len(counts), len(counts) + more]))
    assert (marked[0, len(counts) :] == balance_statistics.ABSENT).all()
    for function in (
        balance_statistics.max_violation,
        balance_statistics.coefficient_of_variation,
        balance_statistics.normalized_entropy,
        balance_statistics.num_dead_experts,
    ):
        assert function(marked)[0] == pytest.approx(function(alone)[0]), function.__name__
    load_ME = balance_statistics.relative_load(marked)
    assert load_ME[0, : len(counts)] == pytest.approx(balance_statistics.relative_load(alone)[0])
    assert np.isnan(load_ME[0, len(counts) :]).all() and (load_ME[1] == 1).all()
