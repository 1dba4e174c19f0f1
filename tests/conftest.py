"""The host backend has to be in place before any test imports torchtitan."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Four ranks on gloo, also where there is a GPU.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

from titan_moe_lb.upstream import cpu

if cpu.needed():
    cpu.use_host()

from tests.rank_pool import RankPool


@pytest.fixture(scope="session")
def ranks():
    """Four processes for the whole session; see :class:`RankPool`."""
    with RankPool(4) as pool:
        yield pool
