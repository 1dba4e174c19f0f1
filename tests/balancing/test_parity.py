"""The claim of this package, on real processes: the layout does not change the gradient."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch

from tests.parity import lost_gradient, random_layouts
from tests.parity.balance import faults
from tests.parity.compare import Comparison, Parity, assert_same_log, relative_error
from tests.parity.float32_experts import all_experts
from tests.parity.gradients import Recorded
from tests.parity.layout import Layout, parse
from tests.parity.textbook import textbook_gradients
from titan_moe_lb.parallel.schedules import SCHEDULES

TOLERANCE = 1e-5
WEIGHT = 0.1
EXACT_LOSSES = ("sequence_wise", "global_batch", "z_loss")

LAYOUTS = [
    "dp_shard=2",
    "dp_shard=4",
    "dp_replicate=2,dp_shard=2",
    "accumulate=2",
    "accumulate=4",
    "dp_shard=2,accumulate=2",
    "pp=2,microbatch=1",
    "pp=2,microbatch=2",
    "pp=4,microbatch=1",
    "pp=4,microbatch=2",
    "pp=2,schedule=GPipe",
    "pp=2,schedule=Interleaved1F1B,dp_shard=2",
    "pp=2,schedule=LoopedBFS",
    "pp=2,schedule=ZBVZeroBubble,dp_shard=2",
    "pp=2,schedule=InterleavedZeroBubble",
    "pp=2,schedule=DualPipeV",
    "pp=2,schedule=Interleaved1F1B,dp_shard=2,accumulate=2,ac=full",
    "tp=2",
    "tp=2,sequence_parallel=false",
    "tp=2,spmd_backend=partial_dtensor",
    "tp=2,spmd_backend=full_dtensor",
    "dp_shard=2,spmd_backend=full_dtensor",
    "tp=2,dp_shard=1,ep=2",
    "tp=2,ep=2,spmd_backend=partial_dtensor",
    "dp_shard=2,ep=2",
    "dp_shard=4,ep=4",
    "cp=2",
    "cp=2,spmd_backend=partial_dtensor",
    "cp=2,dp_shard=2",
    "cp=2,tp=2,ep=2",
    "pp=2,tp=2",
    "pp=2,schedule=InterleavedZeroBubble,tp=2,microbatch=4",
    "ac=full",
    "ac=selective",
]
# A block's kernels are those of one process wherever FSDP or the pipeline puts the block, so
# that these two need the traced graphs alone. A backward in two passes needs the kernels:
# only inductor writes over donated buffers. Wherever kernels are compiled, here and in the
# other files, a pass has one row: most kernels are then the same, and compiled once.
COMPILED_LAYOUTS = [
    "accumulate=8,compile=true",
    "dp_shard=2,compile=true,backend=aot_eager",
    "pp=4,compile=true,backend=aot_eager",
    "pp=2,schedule=ZBVZeroBubble,dp_shard=2,compile=true",
]
# Its definition is the batch of one rank, so no layout here cuts the batch. test_router.py
# runs inductor's kernels of it.
BATCH_WISE_LAYOUTS = [
    "tp=2",
    "tp=2,ep=2",
    "cp=2",
    "cp=2,ep=2",
    "ac=full",
    "ac=selective",
    "compile=true,backend=aot_eager",
]


@pytest.fixture(scope="module")
def exact(ranks):
    losses = [{"type": kind, "weight": WEIGHT} for kind in EXACT_LOSSES]
    with Parity(ranks, {"aux_losses": losses}, alone=EXACT_LOSSES) as parity:
        yield parity


@pytest.fixture(scope="module")
def batch_wise(ranks):
    loss = {"type": "batch_wise", "weight": WEIGHT, "count_from": "scores"}
    with Parity(ranks, {"aux_losses": [loss]}) as parity:
        yield parity


@pytest.fixture(scope="module")
def running(ranks):
    loss = {"type": "global_batch", "weight": WEIGHT, "counts": "running"}
    with Parity(ranks, {"aux_losses": [loss]}) as parity:
        yield parity


def check(parity: Parity, layout: str) -> None:
    for comparison in parity.compare(parse(layout)):
        assert comparison.max_relative_error <= TOLERANCE, comparison
        assert comparison.num_parameters > 40
        expected = comparison.expected
        assert len(expected.layers) == 3
        assert_same_log(comparison.recorded, expected)
        assert all(
            torch.equal(comparison.recorded.bias[layer], bias)
            for layer, bias in expected.bias.items()
        )


@pytest.fixture(scope="module")
def together(ranks):
    """All losses in one pass, weighted to gradients of about one size.

    A compiled block is specialised to its weights; one pass is one compilation.
    """
    weights = {"sequence_wise": WEIGHT, "global_batch": WEIGHT, "z_loss": WEIGHT / 100}
    losses = [{"type": kind, "weight": weight} for kind, weight in weights.items()]
    with Parity(ranks, {"aux_losses": losses}) as parity:
        yield parity


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_does_not_depend_on_the_layout(exact, layout):
    check(exact, layout)


@pytest.mark.parametrize("layout", COMPILED_LAYOUTS)
def test_gradient_does_not_depend_on_compilation(together, layout):
    check(together, layout)


@pytest.mark.parametrize("layout", BATCH_WISE_LAYOUTS)
def test_batch_wise_gradient_where_the_batch_stays_whole(batch_wise, layout):
    check(batch_wise, layout)


@pytest.mark.parametrize("layout", ["dp_shard=2", "dp_shard=2,ep=2", "cp=2,dp_shard=2", "ac=full"])
def test_running_counts_where_the_batch_is_one_pass(running, layout):
    """One micro-batch on each rank: the running counts are those of the whole global batch."""
    check(running, layout)


def test_running_counts_see_the_micro_batches_so_far(running):
    """They are an approximation under accumulation; the previous step's are not."""
    (comparison,) = running.compare(Layout(accumulate=2))
    assert comparison.max_relative_error > 100 * TOLERANCE


@pytest.mark.parametrize("checkpointing", ["full", "selective"])
def test_running_counts_are_not_taken_again_when_a_forward_repeats(running, checkpointing):
    """A repeated micro-batch would see the counts of those that came after it."""
    plain, repeated = (
        running.gradients(Layout(accumulate=4, ac=ac))[""] for ac in ("none", checkpointing)
    )
    comparison = relative_error(Layout(), "", repeated, plain)
    assert comparison.max_relative_error <= TOLERANCE, comparison
    assert_same_log(comparison.recorded, comparison.expected)


def test_batch_wise_depends_on_the_data_parallel_degree(batch_wise):
    """The harness can fail: this loss is not additive over ranks."""
    (comparison,) = batch_wise.compare(Layout(dp_shard=2))
    assert comparison.max_relative_error > 100 * TOLERANCE


def test_reference_is_autograd_on_the_textbook_loss(ranks, tmp_path):
    losses = [{"type": kind, "weight": WEIGHT} for kind in EXACT_LOSSES]
    with Parity(ranks, {"aux_losses": losses}, with_main_loss=True, alone=EXACT_LOSSES) as parity:
        reference = parity.reference(Layout())
        (files,) = ranks.run(
            1,
            textbook_gradients,
            parity.seed_folder,
            str(tmp_path),
            module=parity.module,
            config=parity.config,
            model=parity.model,
            weight=WEIGHT,
        )
    for kind in EXACT_LOSSES:
        textbook = torch.load(files[kind]), reference[kind][1]
        comparison = relative_error(Layout(), kind, reference[kind], textbook)
        assert comparison.max_relative_error <= TOLERANCE, comparison
        assert comparison.num_parameters > 50
        assert json.loads(comparison.line())["recorded"]["layers"] == [1, 2, 3]


def test_torch_loses_the_gradient_for_which_a_rule_refuses_a_job(ranks):
    """A torch that does not makes ``gradients_are_kept`` deletable."""
    of_two, of_one = (ranks.run(2, lost_gradient.gradient, rows)[0] for rows in (2, 1))
    assert of_two.unique().tolist() == [2.0]
    assert of_one.unique().tolist() == [1.0]


def test_experts_of_unknown_rows_are_lowered_by_inductor():
    """As those of an expert-parallel rank, whose kernels no layout here compiles."""

    def experts(x_RY, chosen_R, w_EXY):
        return all_experts(x_RY[chosen_R.nonzero()[:, 0]], w_EXY)

    x_RY, w_EXY = torch.randn(6, 4), torch.randn(2, 3, 4)
    chosen_R = torch.tensor([1, 0, 1, 1, 0, 0])
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(experts, fullgraph=True)(x_RY, chosen_R, w_EXY)
    expected = torch.einsum("ry,exy->rex", x_RY[chosen_R.bool()], w_EXY)
    torch.testing.assert_close(compiled, expected)


def test_layouts_that_nobody_chose(ranks):
    """A short form of ``python -m tests.parity --random 200``."""
    said: list[str] = []
    outcome = random_layouts.run(ranks, 3, 2, say=lambda line, flush: said.append(line))
    assert outcome.layouts == 3 and outcome.failures == [], "\n".join(said)
    assert 0 < outcome.worst <= TOLERANCE


def test_a_drawn_layout_is_repeated_by_its_words():
    dice = random.Random(0)
    drawn = [random_layouts.draw_layout(dice, 4) for _ in range(200)]
    assert all(parse(str(layout)) == layout for layout in drawn)
    assert {layout.num_ranks for layout in drawn} == {1, 2, 4}
    assert len({layout.schedule for layout in drawn}) == len(SCHEDULES)


def test_what_differs_is_found():
    """In each of the things that are compared."""
    expected = Recorded({"loss": [1.0]}, [[1, 2]], (1,), {1: torch.ones(2)}, {1: torch.ones(2)})
    others = {
        "gradient of w": {"max_relative_error": 1.0},
        "layers": {"recorded": replace(expected, layers=(2,))},
        "counts": {"recorded": replace(expected, counts=[[2, 1]])},
        "loss": {"recorded": replace(expected, losses={"loss": [1.0 + 1e-5]})},
        "valid counts of layer 1": {
            "recorded": replace(expected, valid_counts={1: torch.zeros(2)})
        },
        "bias of layer 1": {"recorded": replace(expected, bias={1: torch.ones(2) + 1e-7})},
        "layers with a bias": {"recorded": replace(expected, bias={})},
    }
    same = Comparison(Layout(), "", 1e-7, "w", 1, expected, expected)
    assert faults(same) == []
    for name, change in others.items():
        assert faults(replace(same, **change)) == [name]
