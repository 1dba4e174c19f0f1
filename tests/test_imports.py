"""The garbage collector waits for the imports, and leaves what they made alone."""

from __future__ import annotations

import gc

import pytest

from titan_moe_lb import imports


def test_collector_is_off_within_and_on_again_after_even_a_failed_import():
    with pytest.raises(ImportError), imports.uncollected():
        with imports.uncollected():
            kept = [[]]
        assert not gc.isenabled(), "the inner one leaves it as it was"
        raise ImportError
    assert gc.isenabled()
    assert not any(kept is found for found in gc.get_objects())


def test_collector_that_was_off_stays_off():
    gc.disable()
    try:
        with imports.uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
