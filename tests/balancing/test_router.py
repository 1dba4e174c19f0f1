"""The router and its record in one process, against torchtitan's own router."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torchtitan.components.lora import LoRAConverter
from torchtitan.config.override import derive
from torchtitan.models.common.config_utils import make_router_config
from torchtitan.models.common.moe import TokenChoiceTopKRouter

from model_registry.deepseek_v3 import model_registry
from tests.support import gate_jobs
from titan_moe_lb.balancing.losses import (
    BatchWiseAuxLoss,
    GlobalBatchAuxLoss,
    RouterZLoss,
    SequenceWiseAuxLoss,
    functional,
)
from titan_moe_lb.balancing.router import LoadBalancedRouter
from titan_moe_lb.balancing.step_hook import wire
from titan_moe_lb.errors import JobError
from titan_moe_lb.parallel.rank_groups import RankGroups

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
    record = wire([built], RankGroups())
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


def lora_gate(built: TokenChoiceTopKRouter, dtype: torch.dtype) -> torch.nn.Module:
    """The gate with adapters, as torchtitan's LoRA makes it."""
    config = LoRAConverter.Config(rank=4, alpha=8.0).build()._make_lora_config(built.config.gate)
    gate = config.build()
    for seed, weight in enumerate(gate.parameters()):
        torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(seed))
    return gate.to(dtype)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gate_in_half_precision_computes_in_float32(dtype, lora):
    """Against the formula on float32 copies: logits, and gradients in the dtype of the weights."""
    built = router().to(dtype)
    if lora:
        built.gate = lora_gate(built, dtype)
    x, _ = inputs(dtype)
    scores = built(x)[2]
    scores.square().sum().backward()

    y = x.detach().float().requires_grad_()
    weights = {
        name: p.detach().float().requires_grad_() for name, p in built.gate.named_parameters()
    }
    logits = y @ weights["weight"].T
    if lora:
        logits = logits + 2.0 * (y @ weights["lora_a.weight"].T @ weights["lora_b.weight"].T)
    expected = logits.sigmoid()
    expected.square().sum().backward()
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=1e-6)
    for name, parameter in built.gate.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.dtype == dtype
            torch.testing.assert_close(parameter.grad, weights[name].grad.to(dtype))
    torch.testing.assert_close(x.grad, y.grad.to(dtype))


@pytest.mark.parametrize("lora", [False, True])
def test_the_gate_is_bit_for_bit_the_autocast_of_a_gpu(lora):
    """torch's operators know an autocast to float32 on the host, which its Python face refuses."""
    built = router().to(torch.bfloat16)
    if lora:
        built.gate = lora_gate(built, torch.bfloat16)
    results = []
    for forward in (lambda x: built(x)[2], lambda x: built.gate(x).sigmoid()):
        x, _ = inputs(torch.bfloat16)
        built.zero_grad()
        if len(results) == 0:
            scores = forward(x)
        else:
            torch.set_autocast_dtype("cpu", torch.float32)
            torch.set_autocast_enabled("cpu", True)
            try:
                scores = forward(x)
            finally:
                torch.set_autocast_enabled("cpu", False)
                torch.set_autocast_dtype("cpu", torch.bfloat16)
        scores.square().sum().backward()
        gradients = [p.grad for p in built.gate.parameters() if p.grad is not None]
        results.append([scores, x.grad, *gradients])
    assert len(results[0]) == (4 if lora else 3)
    for index, (ours, autocast) in enumerate(zip(*results, strict=True)):
        assert ours.dtype == autocast.dtype
        if lora and index == 1:  # the autocast rounds what each of two products gives the input
            torch.testing.assert_close(ours, autocast, rtol=0, atol=2**-7 * ours.abs().max())
        else:
            assert torch.equal(ours, autocast)


def test_a_gate_within_another_autocast_computes_in_float32():
    built, (x, _) = router(), inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = built(x)[2]
    assert scores.dtype == torch.float32
    assert torch.equal(scores, built(x)[2])


LAYOUTS = {
    "FSDP": ["--parallelism.data_parallel_shard_degree=2"],
    "EP": ["--parallelism.data_parallel_shard_degree=2", "--parallelism.expert_parallel_degree=2"],
    "FSDP, TP": [
        "--parallelism.data_parallel_shard_degree=2",
        "--parallelism.tensor_parallel_degree=2",
    ],
    "FSDP, TP, partial_dtensor": [
        "--parallelism.data_parallel_shard_degree=2",
        "--parallelism.tensor_parallel_degree=2",
        "--parallelism.spmd_backend=partial_dtensor",
    ],
    "FSDP, TP, full_dtensor": [
        "--parallelism.data_parallel_shard_degree=2",
        "--parallelism.tensor_parallel_degree=2",
        "--parallelism.spmd_backend=full_dtensor",
    ],
    "FSDP, full checkpointing": [
        "--parallelism.data_parallel_shard_degree=2",
        "activation-checkpoint:full",
    ],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mixed_precision_leaves_scores_in_float32(ranks, layout):
    """Activations in bfloat16, whose scores would be off by 2e-3 and tie."""
    flags = LAYOUTS[layout]
    num_ranks = 4 if "TP" in layout else 2
    job = ["--config", "deepseek_v3_tiny", "--training.seq_len=128", *flags]
    for gates in ranks.run(num_ranks, gate_jobs.gates, job):
        assert gates
        for x, scores, error, gradient, learns in gates:
            assert (x, scores, gradient) == (torch.bfloat16, torch.float32, torch.float32)
            assert error < 1e-6 and learns


@pytest.mark.parametrize("lora", [False, True])
def test_a_gate_in_half_precision_compiles_without_graph_breaks(lora):
    built = router([sequence_wise()]).to(torch.bfloat16)
    if lora:
        built.gate = lora_gate(built, torch.bfloat16)
    wired(built)
    results = []
    for forward in (built, torch.compile(built, fullgraph=True, backend="aot_eager")):
        x, _ = inputs(torch.bfloat16)
        built.zero_grad()
        scores = forward(x)[0]
        scores.sum().backward()
        results.append([scores, x.grad, *(p.grad for p in built.gate.parameters())])
    for eager, compiled in zip(*results, strict=True):
        assert (eager is None) == (compiled is None)
        if eager is not None:
            assert torch.equal(eager, compiled)
    torch._dynamo.reset()


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
    built.record = built.step_record = None
    with pytest.raises(JobError, match="call titan_moe_lb.attach"):
        built(inputs()[0])
