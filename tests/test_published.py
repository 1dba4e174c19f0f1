"""The plan beside runs that nobody here made. The figures are their authors': docs/planning.md."""

from __future__ import annotations

import pytest

from benchmarks.published.peaks import PEAKS
from benchmarks.published.slowdowns import MODELS


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_slowdown_at_a_measured_imbalance(model):
    """Without balancing, and under each of four balancers: within a fifth."""
    assert model.predicted() == pytest.approx(model.measured(), rel=0.2)


@pytest.mark.parametrize(
    "peak", [peak for peak in PEAKS if not peak.unknown], ids=lambda peak: peak.name
)
def test_peak_of_a_gpu(peak):
    """Without checkpointing and under the selective policy, with EP and without."""
    planned = peak.planned_gib()
    if peak.above:
        assert planned > peak.gib
    else:
        assert planned == pytest.approx(peak.gib, rel=0.15)
