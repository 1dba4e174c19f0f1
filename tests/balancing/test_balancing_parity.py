"""Every loss and the quantile bias under every layout, on a batch of which 40 % is padding.

The reference is the same batch without its padding: one process, each row cut to its own
length, nothing masked.
"""

from __future__ import annotations

import pytest
import torch

from tests.parity.compare import Parity
from tests.parity.layout import parse

TOLERANCE = 1e-5
NUM_BINS = 1000
LOSSES = (
    {"type": "sequence_wise", "weight": 0.1, "over": "document", "max_documents": 4},
    {"type": "global_batch", "weight": 0.1},
    {"type": "device_level", "weight": 0.1, "num_device_groups": 4},
    {"type": "communication", "weight": 0.1, "num_device_groups": 4, "devices_per_token": 2},
    {"type": "importance", "weight": 0.1},
    {"type": "entropy", "weight": 0.1},
    {"type": "z_loss", "weight": 0.001},
)
ALONE = tuple(loss["type"] for loss in LOSSES)
LAYOUTS = [
    "",
    "dp_shard=2",
    "accumulate=2",
    "pp=2,schedule=ZBVZeroBubble",
    "tp=2",
    "tp=2,ep=2",
    "cp=2",
    "ac=full",
    "ac=selective",
]
COMPILED_LAYOUTS = ["accumulate=8,compile=true", "ac=full,compile=true,backend=aot_eager"]


@pytest.fixture(scope="module")
def padded(ranks):
    model = {"aux_losses": list(LOSSES), "expert_bias": {"type": "quantile", "num_bins": NUM_BINS}}
    with Parity(ranks, model, with_main_loss=True, alone=("", *ALONE), padded=True) as parity:
        yield parity


@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_and_layout_change_nothing(padded, layout):
    comparisons = padded.compare(parse(layout))
    check_gradients(comparisons)
    check_bias(comparisons[-1])


@pytest.mark.parametrize("layout", COMPILED_LAYOUTS)
def test_padding_and_compilation_change_nothing(padded, layout):
    comparisons = padded.compare(parse(layout), alone=("",))
    check_gradients(comparisons)
    check_bias(comparisons[0])


@pytest.mark.parametrize(
    ("rule", "layout"),
    [
        ({"type": "proportional", "speed": 0.01}, "pp=2,schedule=ZBVZeroBubble"),
        ({"type": "momentum"}, "tp=2,ep=2"),
    ],
    ids=lambda value: value["type"] if isinstance(value, dict) else value,
)
def test_a_rule_of_counts_keeps_every_bit(ranks, rule, layout):
    """The bias after two steps, which are functions of counts, and counts are whole numbers."""
    model = {"aux_losses": [], "expert_bias": rule}
    with Parity(ranks, model, with_main_loss=True, padded=True) as parity:
        (comparison,) = parity.compare(parse(layout))
    expected = comparison.expected.bias
    assert len(expected) == 3
    for layer, bias in expected.items():
        assert bias.any() and torch.equal(comparison.recorded.bias[layer], bias)


def check_gradients(comparisons) -> None:
    """Values to 1e-6, or 1e-7 where they are differences: the entropy's from log E."""
    for comparison in comparisons:
        assert comparison.max_relative_error <= TOLERANCE, comparison
        for name, values in comparison.expected.losses.items():
            assert comparison.recorded.losses[name] == pytest.approx(values, rel=1e-6, abs=1e-7), (
                name
            )


def check_bias(comparison) -> None:
    """Counts bitwise, the histograms but for scores that round across an edge, the bias to 1/1000
    of a uniform bin."""
    recorded, expected = comparison.recorded, comparison.expected
    assert recorded.bias.keys() == expected.bias.keys() and len(expected.bias) == 3
    for layer, counts in expected.valid_counts.items():
        assert torch.equal(recorded.valid_counts[layer], counts)
    for layer, bias in expected.bias.items():
        moved = (recorded.histograms[layer] - expected.histograms[layer]).abs().sum() / 2
        assert moved <= 1e-3 * expected.histograms[layer].sum()
        width = (torch.max(bias) - torch.min(bias) + 2) / NUM_BINS
        assert (recorded.bias[layer] - bias).abs().max() <= width / 1000
