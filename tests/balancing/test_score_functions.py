"""Score functions against float64, at logits that float32 hardly holds."""

from __future__ import annotations

import math

import pytest
import torch

from tests.support.routers import router
from titan_moe_lb.balancing.score_functions import SCORE_FUNCTIONS, sqrt_softplus
from titan_moe_lb.errors import JobError
from titan_moe_lb.functional import gather_scores, inverse_sums
from titan_moe_lb.rules.routers import check_router


def exact(logit: float) -> tuple[float, float]:
    """Score and slope of one logit, in float64, by the formula that is exact there."""
    softplus = math.log1p(math.exp(logit)) if logit < 30 else logit + math.exp(-logit)
    score = math.sqrt(softplus) if logit > -700 else math.exp(logit / 2)
    sigmoid = 1 / (1 + math.exp(-logit)) if logit > -700 else math.exp(logit)
    return score, sigmoid / score / 2


@pytest.mark.parametrize(
    ("dtype", "logits", "bound"),
    [
        (torch.float32, [-170, -104, -88, -41, -40, -39, -20, -1, 0, 1e-6, 1, 20, 41, 1e4], 4e-7),
        (torch.float64, [-690, -104, -41, -40, -39, -20, -1, 0, 1e-6, 1, 20, 41, 1e4], 1e-15),
    ],
)
def test_sqrtsoftplus_is_exact(dtype, logits, bound):
    x = torch.tensor(logits, dtype=dtype, requires_grad=True)
    scores = sqrt_softplus(x)
    scores.sum().backward()
    for logit, found, slope in zip(x.tolist(), scores.tolist(), x.grad.tolist(), strict=True):
        score, right = exact(logit)
        assert found == pytest.approx(score, rel=bound)
        assert slope == pytest.approx(right, rel=bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sqrtsoftplus_is_finite(dtype):
    largest = torch.finfo(dtype).max
    values = [-largest, -1e4, -300, -206, -150, 0, 88, 300, 1e4, largest]
    x = torch.tensor(values, dtype=dtype, requires_grad=True)
    scores = sqrt_softplus(x)
    scores.sum().backward()
    assert scores.isfinite().all() and x.grad.isfinite().all()
    assert (scores.diff() >= 0).all() and (x.grad >= 0).all()


def test_losses_of_far_logits_are_finite():
    """The closed form of the losses divides by the sum of scores, which here is about 1e-35."""
    x = torch.full((1, 4, 8), -160.0)
    x += torch.arange(8.0)
    x.requires_grad_()
    scores = sqrt_softplus(x)
    inverse = inverse_sums(scores.detach())
    gather_scores(scores, scores.topk(2).indices, torch.arange(8.0)[None], inverse).sum().backward()
    y = x.detach().double().requires_grad_()
    p = torch.exp(y / 2) / torch.exp(y / 2).sum(-1, keepdim=True)
    (p.sum(1) * torch.arange(8.0)).sum().backward()
    torch.testing.assert_close(x.grad, y.grad.float(), rtol=1e-5, atol=1e-6)


def test_sqrtsoftplus_is_differentiable_by_transforms_and_twice():
    x = torch.linspace(-3, 3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(sqrt_softplus, x)
    slope = torch.func.grad(lambda x: sqrt_softplus(x).sum())(x.detach())
    assert slope.tolist() == pytest.approx([exact(logit)[1] for logit in x.tolist()])


def test_an_unknown_function_is_refused():
    built = router()
    built.config.score_func = "sqrt_softplus"
    with pytest.raises(JobError, match="'sqrtsoftplus'"):
        check_router("layer 3", built.config)
    assert list(SCORE_FUNCTIONS) == ["softmax", "sigmoid", "sqrtsoftplus"]
