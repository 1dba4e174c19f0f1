"""The gradients of the model's loss and of the aux losses in the logits, measured apart."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.balancing.test_router import (
    BATCH,
    BOUND,
    DIM,
    EXPERTS,
    LENGTH,
    TOP_K,
    inputs,
    router,
    sequence_wise,
)
from tests.parity.compare import Parity, assert_same_log, relative_error
from tests.parity.layout import parse
from titan_moe_lb.balancing.losses import RouterZLoss
from titan_moe_lb.balancing.step_hook import wire
from titan_moe_lb.parallel.rank_groups import RankGroups

WEIGHT, Z_WEIGHT = 0.5, 0.25


def measuring(losses, score_func):
    built = router(losses, score_func)
    built.config.loop = dataclasses.replace(built.config.loop, gradients=True)
    record = wire([built], RankGroups())
    record.weights_A.copy_(
        torch.tensor([loss.config.weight / BATCH for loss in built.aux_losses.values()])
    )
    return built, record


@pytest.mark.parametrize("score_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("kinds", ["sums and logits", "logits", "none"])
def test_against_autograd_of_the_formulas(score_func, kinds):
    """One after the other, on the textbook: sum_i f_i P_i of each sequence, and the z-loss."""
    losses = {
        "sums and logits": [
            sequence_wise(weight=WEIGHT),
            RouterZLoss.Config(weight=Z_WEIGHT, **BOUND),
        ],
        "logits": [RouterZLoss.Config(weight=Z_WEIGHT, **BOUND)],
        "none": [],
    }[kinds]
    built, record = measuring(losses, score_func)
    x, bias = inputs()
    weights = torch.randn(BATCH, LENGTH, TOP_K, generator=torch.Generator().manual_seed(2))
    for half in (slice(0, 2), slice(2, 3)):  # two forwards of one step
        scores, ids, _full = built(x[half], bias)
        (scores * weights[half]).sum().backward()
    record.finish_step(BATCH)
    plain = router(losses, score_func)
    plain_x = x.detach().clone().requires_grad_()
    (plain(plain_x, bias)[0] * weights).sum().backward()

    logits = torch.nn.functional.linear(x.detach(), built.gate.weight.detach()).requires_grad_()
    scores = logits.softmax(-1) if score_func == "softmax" else logits.sigmoid()
    ids = (scores + bias).topk(TOP_K, dim=-1).indices
    main = (scores.gather(-1, ids) * weights_in_order(weights, built, x, bias, ids)).sum()
    (main_gradient,) = torch.autograd.grad(main, logits, retain_graph=True)
    aux = 0.0 * logits.sum()
    if kinds == "sums and logits":
        shares = scores / scores.sum(-1, keepdim=True)
        counts = torch.zeros_like(scores).scatter(-1, ids, 1.0).sum(1)
        load = counts * EXPERTS / (TOP_K * LENGTH)
        aux = aux + WEIGHT * (load * shares.mean(1)).sum() / BATCH
    if kinds != "none":
        aux = aux + Z_WEIGHT * logits.logsumexp(-1).square().mean(1).sum() / BATCH
    (aux_gradient,) = torch.autograd.grad(aux, logits)
    found = record.step_gradient_squares_N2[0]
    torch.testing.assert_close(found[0], main_gradient.square().sum(), rtol=1e-5, atol=0)
    torch.testing.assert_close(found[1], aux_gradient.square().sum(), rtol=1e-5, atol=0)
    # And what the gate learns is what it learns unmeasured.
    total = (main_gradient + aux_gradient).flatten(0, 1).T @ x.detach().flatten(0, 1)
    assert total.shape == (EXPERTS, DIM)
    torch.testing.assert_close(built.gate.weight.grad, total, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(built.gate.weight.grad, plain.gate.weight.grad, rtol=1e-5, atol=1e-6)


def weights_in_order(weights, built, x, bias, ids):
    """The weights of the output in the order of ``ids``: the router's own order is free."""
    with torch.no_grad():
        own = built.eval()(x, bias)[1]
    built.train()
    place = (ids.unsqueeze(-1) == own.unsqueeze(-2)).int().argmax(-1)
    return weights.gather(-1, place)


LAYOUTS = [
    "accumulate=4",
    "dp_shard=2,ac=full",
    "pp=2,schedule=Interleaved1F1B",
    "tp=2,ep=2",
    "cp=2",
    "dp_shard=2,ep=2,ac=selective,compile=true,backend=aot_eager",
]


@pytest.fixture(scope="module")
def measured_parity(ranks):
    losses = [{"type": "sequence_wise", "weight": 0.1}, {"type": "z_loss", "weight": 1e-3}]
    with Parity(
        ranks, {"aux_losses": losses}, with_main_loss=True, router_gradients=True
    ) as parity:
        yield parity


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_measures_the_same_and_learns_the_same(measured_parity, layout):
    (comparison,) = measured_parity.compare(parse(layout))
    assert comparison.max_relative_error <= 1e-5, comparison
    assert_same_log(comparison.recorded, comparison.expected, relative=1e-5)
    for name in ("main_gradient_squared", "aux_gradient_squared"):
        assert min(comparison.expected.losses[name]) > 0


def test_what_is_learned_is_what_is_learned_unmeasured(ranks, measured_parity):
    with Parity(ranks, measured_parity.model, with_main_loss=True) as plain:
        expected = plain.reference(parse(""))[""]
    comparison = relative_error(parse(""), "", measured_parity.reference(parse(""))[""], expected)
    assert comparison.max_relative_error <= 1e-6, comparison
