"""Tests of the plan against published runs. Their numbers are in
docs/evidence/published_runs.md."""

from __future__ import annotations

import pytest

from benchmarks.published.peaks import PEAKS
from benchmarks.published.slowdowns import MODELS


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_slowdown_at_a_measured_imbalance(model):
    """The predicted slowdown is within a fifth, without balancing and under each of four balancers.

    Without balancing, the time that imbalance adds to a step is within a half.
    """
    predicted, measured = model.predicted(), model.measured()
    assert predicted == pytest.approx(measured, rel=0.2)
    assert predicted[0] - 1 == pytest.approx(measured[0] - 1, rel=0.5)


@pytest.mark.parametrize(
    "peak", [peak for peak in PEAKS if not peak.unknown], ids=lambda peak: peak.name
)
def test_peak_of_a_gpu(peak):
    """The jobs have no checkpointing or the selective policy, with EP and without."""
    planned = peak.planned_gib()
    if peak.above:
        assert planned > peak.gib
    else:
        assert planned == pytest.approx(peak.gib, rel=0.15)
