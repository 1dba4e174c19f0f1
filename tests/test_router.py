"""The router and its record in one process, against torchtitan's own router."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torchtitan.config.override import derive
from torchtitan.models.common.config_utils import make_router_config
from torchtitan.models.common.moe import TokenChoiceTopKRouter

from model_registry.deepseek_v3 import model_registry
from titan_moe_lb.errors import JobError
from titan_moe_lb.losses import (
    BatchWiseAuxLoss,
    GlobalBatchAuxLoss,
    RouterZLoss,
    SequenceWiseAuxLoss,
    functional,
)
from titan_moe_lb.router import LoadBalancedRouter
from titan_moe_lb.step_hook import wire

DIM, EXPERTS, TOP_K, BATCH, LENGTH = 32, 8, 2, 3, 20
BOUND = {"num_experts": EXPERTS, "top_k": TOP_K}
GROUPS = {"num_expert_groups": 4, "num_limited_groups": 2}


def router(losses=(), score_func="sigmoid", cls=LoadBalancedRouter, **options):
    config = make_router_config(
        dim=DIM,
        num_experts=EXPERTS,
        gate_param_init={},
        top_k=TOP_K,
        score_func=score_func,
        **options,
    )
    if cls is LoadBalancedRouter:
        config = derive(config, cls.Config, aux_losses=list(losses))
    built = config.build()
    torch.nn.init.normal_(built.gate.weight, generator=torch.Generator().manual_seed(3))
    if cls is LoadBalancedRouter:
        wired(built)
    return built


def wired(built: LoadBalancedRouter, rows: int = BATCH) -> LoadBalancedRouter:
    """Alone in its process, with the weights of its losses over the rows of a batch."""
    record = wire([built], None)
    weights = [loss.config.weight / rows for loss in built.aux_losses.values()]
    record.weights_A.copy_(torch.tensor(weights))
    return built


def sequence_wise(count_from="selected", weight=0.5):
    return SequenceWiseAuxLoss.Config(weight=weight, count_from=count_from, **BOUND)


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, LENGTH, DIM, generator=generator).to(dtype).requires_grad_()
    return x, 0.2 * torch.randn(EXPERTS, generator=generator).to(dtype)


@pytest.mark.parametrize("score_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("options", [{}, GROUPS, {"route_norm": True, "route_scale": 2.5}])
def test_without_losses_every_bit_is_upstreams(score_func, options):
    results = []
    for cls in (TokenChoiceTopKRouter, LoadBalancedRouter):
        built = router(score_func=score_func, cls=cls, **options)
        x, bias = inputs()
        scores, ids, full = built(x, bias)
        (scores.square().sum() + full.sum()).backward()
        results.append((scores, ids, full, x.grad, built.gate.weight.grad))
    for upstream, ours in zip(*results, strict=True):
        assert torch.equal(upstream, ours)


@pytest.mark.parametrize("count_from", ["selected", "scores"])
@pytest.mark.parametrize("score_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("options", [{}, GROUPS, {"route_norm": True, "route_scale": 2.5}])
def test_gradient_is_that_of_main_plus_weighted_loss(score_func, count_from, options):
    built = wired(router([sequence_wise(count_from)], score_func=score_func, **options).double())
    x, bias = inputs(torch.float64)
    built(x, bias)[0].square().sum().backward()

    reference = router(score_func=score_func, cls=TokenChoiceTopKRouter, **options).double()
    y, _ = inputs(torch.float64)
    topk_scores, ids, full = reference(y, bias)
    counted = ids if count_from == "selected" else full.topk(TOP_K).indices
    loss = functional.sequence_wise_load_balance(full, counted)
    (topk_scores.square().sum() + 0.5 * loss).backward()

    # The coefficients are float32.
    for ours, expected in ((built.gate.weight.grad, reference.gate.weight.grad), (x.grad, y.grad)):
        assert (ours - expected).abs().max() < 1e-6 * expected.abs().max()
    assert built.record.losses_A[0].item() / BATCH == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("score_func", ["softmax", "sigmoid"])
def test_all_losses_together_are_their_sum(score_func):
    """Each with its own weight and count source; the global batch counted a step before."""
    weights = {
        SequenceWiseAuxLoss: 0.5,
        BatchWiseAuxLoss: 0.3,
        GlobalBatchAuxLoss: 0.2,
        RouterZLoss: 0.01,
    }
    losses = [cls.Config(weight=weight, **BOUND) for cls, weight in weights.items()]
    losses[1].count_from = "scores"
    built = wired(router(losses, score_func=score_func, **GROUPS).double())
    previous = torch.arange(1, EXPERTS + 1)
    GlobalBatchAuxLoss.finish_step([built.aux_losses["global_batch"]], previous.unsqueeze(0))
    x, bias = inputs(torch.float64)
    built(x, bias)[0].square().sum().backward()

    reference = router(score_func=score_func, cls=TokenChoiceTopKRouter, **GROUPS).double()
    y, _ = inputs(torch.float64)
    topk_scores, ids, full = reference(y, bias)
    values = [
        functional.sequence_wise_load_balance(full, ids),
        functional.batch_wise_load_balance(full, full.topk(TOP_K).indices),
        functional.load_balance_from_counts(full, previous, int(previous.sum())),
        functional.router_z_loss(reference.gate(y)),
    ]
    total = sum(weight * value for weight, value in zip(weights.values(), values, strict=True))
    (topk_scores.square().sum() + total).backward()

    for ours, expected in ((built.gate.weight.grad, reference.gate.weight.grad), (x.grad, y.grad)):
        assert (ours - expected).abs().max() < 1e-6 * expected.abs().max()
    means = (built.record.losses_A / BATCH).tolist()
    assert means == pytest.approx([v.item() for v in values], rel=1e-6)


def test_global_batch_has_no_gradient_in_the_first_step():
    loss = GlobalBatchAuxLoss.Config(weight=1.0, **BOUND)
    built = router([loss], score_func="softmax")
    x, bias = inputs()
    (0.0 * built(x, bias)[0].sum()).backward()
    assert x.grad.abs().max() < 1e-7
    assert built.record.losses_A.item() == pytest.approx(BATCH)


def test_compiled_without_graph_breaks():
    losses = [sequence_wise("scores"), BatchWiseAuxLoss.Config(weight=0.5, **BOUND)]
    built = router(losses, route_norm=True, **GROUPS)
    eager = wired(copy.deepcopy(built))
    x, bias = inputs()
    explanation = torch._dynamo.explain(built)(x, bias)
    assert explanation.graph_break_count == 0, explanation.break_reasons
    torch._dynamo.reset()
    built.step_record.finish_step(BATCH)
    y, _ = inputs()
    torch.compile(built, fullgraph=True)(x, bias)[0].sum().backward()
    eager(y, bias)[0].sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(built.record.losses_A, eager.record.losses_A)
    assert torch.equal(built.record.counts_MSE, eager.record.counts_MSE)


def test_block_with_losses_compiles_fullgraph():
    """A whole transformer block, as torchtitan compiles it."""
    from torchtitan.distributed import ParallelDims  # noqa: F401  (import order of torchtitan)

    spec = model_registry("tiny")
    moe_config = spec.model.layers[-1].moe
    moe = moe_config.build()
    with torch.no_grad():
        moe.init_states(buffer_device=torch.device("cpu"))
    wired(moe.router)
    torch._dynamo.config.capture_scalar_outputs = True
    x = torch.randn(2, 16, 64, requires_grad=True)
    torch.compile(moe, fullgraph=True, backend="aot_eager")(x).sum().backward()
    assert moe.router.record.counts_MSE.sum(dim=2).tolist() == [[2 * 16 * 2]]
    torch._dynamo.reset()


@pytest.mark.parametrize("recompute", [False, True])
def test_each_forward_is_recorded_once(recompute):
    built = router([sequence_wise()])
    x, bias = inputs()
    for _ in range(2):
        out = checkpoint(built, x, bias, use_reentrant=False)[0] if recompute else built(x, bias)[0]
        out.sum().backward()
    assert built.record.counts_MSE.sum() == 2 * BATCH * LENGTH * TOP_K
    value = built.record.losses_A.clone()
    built.step_record.finish_step(BATCH)
    assert built.record.counts_MSE.sum() == 0
    assert torch.equal(built.step_record.step_losses_NA[0], value * (1 / BATCH))
    with torch.no_grad():
        built.eval()(x, bias)
    assert built.record.counts_MSE.sum() == 0


def test_building_before_binding_says_what_is_missing():
    with pytest.raises(JobError, match=r"use titan_moe_lb\.balanced\(spec, aux_losses"):
        router([SequenceWiseAuxLoss.Config(weight=1.0)])


def test_an_unwired_router_with_a_loss_is_refused():
    built = router([sequence_wise()])
    built.record = None
    with pytest.raises(JobError, match="call titan_moe_lb.attach"):
        built(inputs()[0])
