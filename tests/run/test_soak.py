"""Tests of the soak's arithmetic; the run itself is a command."""

from __future__ import annotations

import numpy as np

from tests import soak


def test_growth_is_told_from_noise_and_from_what_a_save_holds():
    random = np.random.default_rng(0)
    flat = 1000 + random.normal(0, 1.0, 2400)
    flat[::50] += 300  # a save holds a copy for a moment
    for growth in (0.0, 0.02):
        found, error = soak.slope(flat + growth * np.arange(len(flat)))
        assert abs(found - growth) < 4 * error and error < 1e-3
