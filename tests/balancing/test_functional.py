"""Tests of the loss formulas in float64, against autograd on the formulas as written."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.textbook import SCORES, mean_loss, sequence_loss
from titan_moe_lb import functional

RELATIVE = 1e-10


@st.composite
def routings(draw):
    """Generate logits ``(B, L, E)`` float64, an expert bias ``(E,)`` and K."""
    experts = draw(st.integers(2, 12))
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 9)), experts)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits_BLE = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    bias_E = torch.randn(experts, generator=generator, dtype=torch.float64)
    return logits_BLE, bias_E, draw(st.integers(1, experts))


@pytest.mark.parametrize("count_from", ["selected", "scores"])
@pytest.mark.parametrize("score_func", SCORES)
@settings(max_examples=40, deadline=None)
@given(routing=routings())
def test_closed_form_gradient_is_autograd_on_the_formula(score_func, count_from, routing):
    logits_BLE, bias_E, top_k = routing
    num_sequences, length, num_experts = logits_BLE.shape

    expected_logits = logits_BLE.clone().requires_grad_()
    scores = SCORES[score_func](expected_logits)
    selected = (scores + bias_E).topk(top_k).indices
    counted = selected if count_from == "selected" else scores.topk(top_k).indices
    loss = mean_loss("sequence_wise", None, scores, counted)
    main = scores.gather(-1, selected).square().sum()
    (main + 0.3 * loss).backward()

    logits = logits_BLE.clone().requires_grad_()
    ours = SCORES[score_func](logits)
    counts = functional.count_tokens_per_expert(counted, num_experts).double()
    load = functional.expert_load(counts, top_k, length)
    coefficients = 0.3 * load / (length * num_sequences)
    gathered = functional.gather_scores(
        ours,
        selected,
        coefficients,
        None if score_func == "softmax" else functional.inverse_sums(ours.detach()),
    )
    assert torch.equal(gathered, ours.gather(-1, selected))
    gathered.square().sum().backward()

    torch.testing.assert_close(
        logits.grad,
        expected_logits.grad,
        rtol=RELATIVE,
        atol=RELATIVE * expected_logits.grad.abs().max(),
    )


@settings(max_examples=40, deadline=None)
@given(routing=routings())
def test_values_are_the_formulas(routing):
    logits, _bias, top_k = routing
    scores = logits.sigmoid()
    ids = scores.topk(top_k).indices
    sequence_wise = mean_loss("sequence_wise", None, scores, ids)
    batch_wise = sequence_loss("sequence_wise", None, scores.flatten(0, 1), ids.flatten(0, 1))
    z_loss = mean_loss("z_loss", logits, scores, ids)
    for found, expected in (
        (functional.sequence_wise_load_balance(scores, ids), sequence_wise),
        (functional.batch_wise_load_balance(scores, ids), batch_wise),
        (functional.router_z_loss(logits), z_loss),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_perfect_balance_is_one():
    scores = torch.full((2, 8, 4), 0.25)
    ids = (torch.arange(16).reshape(2, 8, 1) + torch.arange(2)) % 4
    assert functional.sequence_wise_load_balance(scores, ids).item() == pytest.approx(1.0)
    assert functional.batch_wise_load_balance(scores, ids).item() == pytest.approx(1.0)


RELATIVE_FLOAT32 = 2e-6


def small_scores(shift: float, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits ``(rows, 16, 8)`` and the top 2 of their scores."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 16, 8, generator=generator)[:rows] + shift
    return logits, logits.topk(2).indices


@pytest.mark.parametrize("formula", ["sequence_wise", "batch_wise", "from_counts"])
@pytest.mark.parametrize("shift", [0, -30, -47, -70, -84])
def test_small_scores_have_the_value_and_gradient_of_float64(shift, formula):
    logits, ids = small_scores(shift)
    exact = logits.double().requires_grad_()
    scores, whole_ids = exact.sigmoid(), ids.flatten(0, 1)
    if formula == "sequence_wise":
        right = mean_loss("sequence_wise", None, scores, ids)
    else:
        right = sequence_loss("sequence_wise", None, scores.flatten(0, 1), whole_ids)
    right.backward()

    logits.requires_grad_()
    if formula == "sequence_wise":
        loss = functional.sequence_wise_load_balance(logits.sigmoid(), ids)
    elif formula == "batch_wise":
        loss = functional.batch_wise_load_balance(logits.sigmoid(), ids)
    else:
        counts = torch.bincount(whole_ids.flatten(), minlength=8)
        loss = functional.load_balance_from_counts(logits.sigmoid(), counts, counts.sum())
    loss.backward()
    assert loss.item() == pytest.approx(right.item(), rel=1e-6)
    error = (logits.grad - exact.grad).abs().max() / exact.grad.abs().max()
    assert error < RELATIVE_FLOAT32


@pytest.mark.parametrize("exponent", [0, -40, -100, -126])
def test_gradients_in_the_smallest_scores_are_those_of_float64(exponent):
    """At -126, half of the scores are below the smallest normal float32 number."""
    scores = torch.rand(2, 16, 8, generator=torch.Generator().manual_seed(0)) * 2.0**exponent
    ids = scores.topk(2).indices
    exact = scores.double().requires_grad_()
    right = mean_loss("sequence_wise", None, exact, ids)
    right.backward()
    scores.requires_grad_()
    loss = functional.sequence_wise_load_balance(scores, ids)
    loss.backward()
    assert loss.item() == pytest.approx(right.item(), rel=1e-6)
    error = (scores.grad.double() - exact.grad).abs().max() / exact.grad.abs().max()
    assert error < RELATIVE_FLOAT32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 16, 8), (1, 1, 256)])
@pytest.mark.parametrize("shift", [-10, -20, -89, -95, -100, -103, -200])
def test_scores_that_a_dtype_hardly_holds_give_finite_numbers(shift, shape, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(shape, generator=generator) + shift).to(dtype).requires_grad_()
    scores = logits.sigmoid()
    scores.retain_grad()
    loss = functional.sequence_wise_load_balance(scores, scores.topk(1).indices)
    loss.backward()
    assert 0 <= loss.item() <= shape[-1]
    assert scores.grad.isfinite().all() and logits.grad.isfinite().all()
    assert logits.grad.abs().max() <= shape[-1]


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (0, 0, 8)])
def test_no_tokens_contribute_zero(shape):
    scores = torch.zeros(shape, requires_grad=True)
    ids = torch.zeros(*shape[:2], 2, dtype=torch.long)
    losses = [
        functional.sequence_wise_load_balance(scores, ids),
        functional.batch_wise_load_balance(scores, ids),
        functional.load_balance_from_counts(scores, torch.zeros(8), 0),
        functional.load_balance_from_counts(scores, torch.zeros(8), torch.zeros(())),
        functional.router_z_loss(scores),
    ]
    sum(losses).backward()
    assert [loss.item() for loss in losses] == [0.0] * 5
    assert scores.grad.shape == shape


def test_a_token_without_scores_leaves_the_others_alone():
    """If all scores of a token are 0, its share of every expert is 0, and so is its gradient."""
    logits, ids = small_scores(0.0)
    logits[0, 3] = -200
    exact = logits.double().requires_grad_()
    p = exact.sigmoid() / exact.sigmoid().sum(-1, keepdim=True).clamp_min(1e-40)
    counts = torch.zeros(2, 8).double().scatter_add_(1, ids.flatten(1), torch.ones(2, 32).double())
    (counts / 4 * p.mean(1)).sum(-1).mean().backward()
    logits.requires_grad_()
    functional.sequence_wise_load_balance(logits.sigmoid(), ids).backward()
    torch.testing.assert_close(logits.grad, exact.grad.float(), rtol=1e-5, atol=1e-9)


def test_differentiable_by_transforms_and_twice():
    logits, ids = small_scores(0.0)
    scores = logits.double().sigmoid()
    gradient = torch.func.grad(functional.sequence_wise_load_balance)(scores, ids)
    expected = torch.autograd.functional.jacobian(
        lambda scores: mean_loss("sequence_wise", None, scores, ids), scores
    )
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
