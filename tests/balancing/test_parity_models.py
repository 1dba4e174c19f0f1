"""The layout does not change the gradient of any model; test_parity.py goes through DeepSeek-V3."""

from __future__ import annotations

import pytest

from tests.parity.compare import Parity, assert_same_log
from tests.parity.layout import parse
from titan_moe_lb.job.module_lookup import registered_models

TOLERANCE = 1e-5
# Gradients of about one size.
WEIGHTS = {"sequence_wise": 0.1, "global_batch": 0.1, "z_loss": 0.001}
LAYOUTS = [
    "dp_shard=2",
    "dp_shard=2,ep=2",
    "tp=2,ep=2",
    "pp=2,schedule=1F1B",
    "pp=2,schedule=Interleaved1F1B",
    "pp=2,schedule=ZBVZeroBubble",
    # What is traced; test_parity.py and the job files run inductor's kernels of it.
    "compile=true,backend=aot_eager",
]


@pytest.fixture(scope="module", params=sorted(set(registered_models()) - {"deepseek_v3"}))
def parity(ranks, request):
    losses = [{"type": kind, "weight": weight} for kind, weight in WEIGHTS.items()]
    model = request.param
    with Parity(ranks, {"aux_losses": losses}, module=model, config=f"{model}_tiny") as parity:
        yield parity


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_does_not_depend_on_the_layout(parity, layout):
    (comparison,) = parity.compare(parse(layout))
    assert comparison.max_relative_error <= TOLERANCE, comparison
    assert comparison.num_parameters > 30
    assert len(comparison.expected.layers) > 1
    assert_same_log(comparison.recorded, comparison.expected)
