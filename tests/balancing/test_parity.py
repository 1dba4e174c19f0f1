"""Tests of parity on real processes: neither the layout nor a compiler changes the gradient.

Each case is a model with its balancing; its reference is one process. Each layout of a case adds
something that the case has not had yet. Compiled layouts have a table of their own.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch

from tests.parity import lost_gradient, random_layouts
from tests.parity.balance import LOSSES, Balance
from tests.parity.compare import TOLERANCE, Comparison, Parity, relative_error
from tests.parity.float32_experts import all_experts
from tests.parity.gradients import Recorded
from tests.parity.layout import Layout, parse
from tests.parity.textbook import textbook_gradients
from titan_moe_lb.job.module_lookup import registered_models
from titan_moe_lb.parallel.schedules import SCHEDULES

WEIGHT = 0.1
EXACT_LOSSES = ("sequence_wise", "global_batch", "z_loss")
TOGETHER = Balance(EXACT_LOSSES).model(WEIGHT)
ALL = Balance(tuple(LOSSES), "quantile", padded=True).model(WEIGHT)
ALL["aux_losses"][0] |= {"over": "document", "max_documents": 4}
OTHER_MODELS = sorted(set(registered_models()) - {"deepseek_v3"})
CASES = {
    "whole": {"model": TOGETHER},
    # 40 % of the batch is padding. The reference has none: each row is cut to its own length.
    "padded": {
        "model": ALL,
        "with_main_loss": True,
        "padded": True,
        "alone": ("", *LOSSES),
    },
    "sqrtsoftplus": {
        "model": Balance(tuple(LOSSES), "quantile_trend", True, "sqrtsoftplus").model(WEIGHT),
        "with_main_loss": True,
        "padded": True,
        "alone": ("", *LOSSES),
    },
    "proportional": {
        "model": Balance((), "proportional").model(),
        "with_main_loss": True,
        "padded": True,
    },
    "momentum": {
        "model": Balance((), "momentum").model(),
        "with_main_loss": True,
        "padded": True,
    },
    # By definition the loss of the batch of one rank, so that no layout here cuts the batch.
    "batch_wise": {
        "model": {"aux_losses": [{"type": "batch_wise", "weight": WEIGHT, "count_from": "scores"}]}
    },
    # One micro-batch on each rank: the running counts are those of the whole global batch.
    "running": {
        "model": {"aux_losses": [{"type": "global_batch", "weight": WEIGHT, "counts": "running"}]}
    },
    "gradient norms": {
        "model": Balance(("sequence_wise", "z_loss")).model(WEIGHT),
        "with_main_loss": True,
        "router_gradients": True,
    },
    **{
        name: {"model": TOGETHER, "module": name, "config": f"{name}_tiny"} for name in OTHER_MODELS
    },
}
LAYOUTS = {
    "whole": [
        "dp_shard=4",
        "dp_replicate=2,dp_shard=2",
        "accumulate=4",
        "dp_shard=2,accumulate=2",
        "pp=4,microbatch=1",
        "pp=2,microbatch=2",
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
        "tp=2,ep=2",
        "tp=2,ep=2,spmd_backend=partial_dtensor",
        "dp_shard=4,ep=2",
        "dp_shard=4,ep=4",
        "cp=2",
        "cp=2,spmd_backend=partial_dtensor",
        "cp=2,dp_shard=2",
        "cp=2,tp=2,ep=2",
        "pp=2,tp=2",
        "pp=2,schedule=InterleavedZeroBubble,tp=2,microbatch=4",
        "ac=full",
        "ac=selective",
    ],
    "padded": [
        "",
        "dp_shard=2",
        "accumulate=2",
        "pp=2,schedule=ZBVZeroBubble",
        "tp=2",
        "tp=2,ep=2",
        "cp=2",
        "ac=full",
        "ac=selective",
    ],
    "sqrtsoftplus": ["pp=2,schedule=ZBVZeroBubble", "tp=2,ep=2", "cp=2", "ac=full"],
    "proportional": ["pp=2,schedule=ZBVZeroBubble"],
    "momentum": ["tp=2,ep=2"],
    "batch_wise": ["tp=2", "tp=2,ep=2", "cp=2", "cp=2,ep=2", "ac=full", "ac=selective"],
    "running": ["dp_shard=2", "dp_shard=2,ep=2", "cp=2,dp_shard=2", "ac=full"],
    "gradient norms": [
        "accumulate=4",
        "dp_shard=2,ac=full",
        "pp=2,schedule=Interleaved1F1B",
        "tp=2,ep=2",
        "cp=2",
    ],
    **dict.fromkeys(
        OTHER_MODELS,
        [
            "dp_shard=2,ep=2",
            "tp=2,ep=2",
            "pp=2,schedule=Interleaved1F1B",
            "pp=2,schedule=ZBVZeroBubble",
        ],
    ),
}
# Kernels where the backward has two passes, because only inductor writes over donated buffers, and
# a pass of one row, so that most blocks have the same kernels. Elsewhere what is traced.
# test_router.py compiles every loss, batch_wise and LoRA too, with inductor; test_recomputation.py
# forced routing and running counts; test_extending.py autograd in a formula of one's own.
COMPILED = {
    "whole": ["pp=2,schedule=ZBVZeroBubble,compile=true"],
    "padded": ["pp=2,schedule=ZBVZeroBubble,ac=full,compile=true,backend=aot_eager"],
    "sqrtsoftplus": ["compile=true,backend=aot_eager"],
    "gradient norms": ["dp_shard=2,ep=2,ac=selective,compile=true,backend=aot_eager"],
    **dict.fromkeys(OTHER_MODELS, ["compile=true,backend=aot_eager"]),
}


def cells(table: dict[str, list[str]]) -> pytest.MarkDecorator:
    """List every layout of every case, with the case's ``parity`` fixture."""
    pairs = [
        pytest.param(case, layout, id=f"{case}-{layout}")
        for case, layouts in table.items()
        for layout in layouts
    ]
    return pytest.mark.parametrize(("parity", "layout"), pairs, indirect=["parity"])


def of_case(case: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("parity", [case], indirect=True)


@pytest.fixture(scope="module")
def parity(ranks, request):
    with Parity(ranks, **CASES[request.param]) as parity:
        yield parity


def check(comparison: Comparison) -> None:
    assert comparison.faults() == [], comparison
    assert comparison.num_parameters > 30
    assert len(comparison.expected.layers) > 1
    assert all(bias.any() for bias in comparison.expected.bias.values())


@cells(LAYOUTS)
def test_gradient_does_not_depend_on_the_layout(parity, layout):
    for comparison in parity.compare(parse(layout)):
        check(comparison)


@cells(COMPILED)
def test_gradient_does_not_depend_on_compilation(parity, layout):
    """All losses run in one pass, because a compiled block is specialized to its weights."""
    (comparison,) = parity.compare(parse(layout), alone=("",))
    check(comparison)


@of_case("running")
def test_running_counts_see_the_micro_batches_so_far(parity):
    """Running counts are an approximation under accumulation; those of the previous step are
    exact."""
    (comparison,) = parity.compare(Layout(accumulate=2))
    assert comparison.max_relative_error > 100 * TOLERANCE


@pytest.mark.parametrize("checkpointing", ["full", "selective"])
@of_case("running")
def test_running_counts_are_not_taken_again_when_a_forward_repeats(parity, checkpointing):
    """Otherwise a repeated micro-batch would see the counts of later micro-batches."""
    plain, repeated = (
        parity.gradients(Layout(accumulate=4, ac=ac))[""] for ac in ("none", checkpointing)
    )
    check(relative_error(Layout(), "", repeated, plain))


@of_case("batch_wise")
def test_batch_wise_depends_on_the_data_parallel_degree(parity):
    """The comparison can fail: this loss is not additive over ranks."""
    (comparison,) = parity.compare(Layout(dp_shard=2))
    assert comparison.max_relative_error > 100 * TOLERANCE


@of_case("gradient norms")
def test_measuring_gradients_changes_none(ranks, parity):
    with Parity(ranks, parity.model, with_main_loss=True) as plain:
        expected = plain.reference(Layout())[""]
    measured = parity.reference(Layout())[""]
    comparison = relative_error(Layout(), "", measured, expected)
    assert comparison.max_relative_error <= 1e-6, comparison
    for name in ("main_gradient_squared", "aux_gradient_squared"):
        assert min(measured[1].losses[name]) > 0


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
        check(comparison)
        assert json.loads(comparison.line())["recorded"]["layers"] == [1, 2, 3]


def test_torch_loses_the_gradient_for_which_a_rule_refuses_a_job(ranks):
    """If this fails, torch keeps the gradient: delete ``gradients_are_kept``."""
    of_two, of_one = (ranks.run(2, lost_gradient.gradient, rows)[0] for rows in (2, 1))
    assert of_two.unique().tolist() == [2.0]
    assert of_one.unique().tolist() == [1.0]


def test_experts_of_unknown_rows_are_lowered_by_inductor():
    """Expert-parallel ranks have such experts; no layout here compiles their kernels."""

    def experts(x_RY, chosen_R, w_EXY):
        return all_experts(x_RY[chosen_R.nonzero()[:, 0]], w_EXY)

    x_RY, w_EXY = torch.randn(6, 4), torch.randn(2, 3, 4)
    chosen_R = torch.tensor([1, 0, 1, 1, 0, 0])
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(experts, fullgraph=True)(x_RY, chosen_R, w_EXY)
    expected = torch.einsum("ry,exy->rex", x_RY[chosen_R.bool()], w_EXY)
    torch.testing.assert_close(compiled, expected)


def test_layouts_that_nobody_chose(ranks):
    """This is a short form of ``python -m tests.parity --random 200``; this seed compiles no
    layout."""
    lines: list[str] = []
    outcome = random_layouts.run(ranks, 3, 32, say=lambda line, flush: lines.append(line))
    assert outcome.layouts == 3 and outcome.failures == [], "\n".join(lines)
    assert 0 < outcome.worst <= TOLERANCE


def test_a_drawn_layout_is_repeated_by_its_words():
    dice = random.Random(0)
    drawn = [random_layouts.draw_layout(dice, 4) for _ in range(200)]
    assert all(parse(str(layout)) == layout for layout in drawn)
    assert {layout.num_ranks for layout in drawn} == {1, 2, 4}
    assert len({layout.schedule for layout in drawn}) == len(SCHEDULES)


def test_every_difference_is_found():
    expected = Recorded({"loss": [1.0]}, [[1, 2]], (1,), {1: torch.ones(2)}, {1: torch.ones(2)})
    same = Comparison(Layout(), "", 1e-7, "w", 1, expected, expected)
    assert same.faults() == []
    assert replace(same, max_relative_error=1.0).faults() == ["gradient of w"]
    for name, change in {
        "layers": {"layers": (2,)},
        "counts": {"counts": [[2, 1]]},
        "loss": {"losses": {"loss": [1.0 + 1e-5]}},
        "valid counts of layer 1": {"valid_counts": {1: torch.zeros(2)}},
        "bias of layer 1": {"bias": {1: torch.ones(2) + 1e-7}},
        "layers with a bias": {"bias": {}},
    }.items():
        assert replace(same, recorded=replace(expected, **change)).faults() == [name]
    counts, moved = torch.tensor([[500, 500]]), torch.tensor([[498, 502]])
    histograms = replace(expected, histograms={1: counts})
    other = replace(histograms, histograms={1: moved})
    assert replace(same, recorded=other, expected=histograms).faults() == ["histograms of layer 1"]
