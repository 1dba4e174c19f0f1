"""Tests of the router and its record in one process, against torchtitan's own router."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.parity.balance import LOSSES
from tests.support import gate_jobs
from tests.support.gate_jobs import lora_gate
from tests.support.routers import (
    DOCUMENTS,
    GROUPS,
    LENGTH,
    PADDED,
    ROWS,
    TOP_K,
    inputs,
    router,
    sequence_wise,
    upstream_router,
    with_mask,
)
from titan_moe_lb.balancing.expert_bias import QuantileBias
from titan_moe_lb.balancing.losses import AuxLoss, SequenceWiseAuxLoss
from titan_moe_lb.balancing.recording.training_loop import TrainingLoop
from titan_moe_lb.errors import JobError


@pytest.mark.parametrize("score_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("options", [{}, GROUPS, {"route_norm": True, "route_scale": 2.5}])
def test_without_losses_every_bit_is_upstreams(score_func, options):
    results = []
    for make in (upstream_router, router):
        built = make(score_func=score_func, **options)
        x, bias = inputs()
        scores, ids, full = built(x, bias)
        (scores.square().sum() + full.sum()).backward()
        results.append((scores, ids, full, x.grad, built.gate.weight.grad))
    for upstream, ours in zip(*results, strict=True):
        assert torch.equal(upstream, ours)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gate_in_half_precision_computes_in_float32(dtype, lora):
    """Logits, and gradients in the dtype of the weights, equal the formula on float32 copies."""
    built = router(dtype=dtype)
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
    if lora:  # alpha / rank = 8 / 4
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


@contextlib.contextmanager
def float32_autocast():
    """Autocast to float32 as on a GPU.

    torch's operators support it on the host too, but its context manager refuses it there.
    """
    torch.set_autocast_dtype("cpu", torch.float32)
    torch.set_autocast_enabled("cpu", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cpu", False)
        torch.set_autocast_dtype("cpu", torch.bfloat16)


@pytest.mark.parametrize("lora", [False, True])
def test_the_gate_is_bit_for_bit_the_autocast_of_a_gpu(lora):
    built = router(dtype=torch.bfloat16)
    if lora:
        built.gate = lora_gate(built, torch.bfloat16)
    results = []
    for context, forward in (
        (contextlib.nullcontext(), lambda x: built(x)[2]),
        (float32_autocast(), lambda x: built.gate(x).sigmoid()),
    ):
        x, _ = inputs(torch.bfloat16)
        built.zero_grad()
        with context:
            scores = forward(x)
        scores.square().sum().backward()
        gradients = [p.grad for p in built.gate.parameters() if p.grad is not None]
        results.append([scores, x.grad, *gradients])
    assert len(results[0]) == (4 if lora else 3)
    for index, (ours, autocast) in enumerate(zip(*results, strict=True)):
        assert ours.dtype == autocast.dtype
        if lora and index == 1:  # the autocast rounds the input's gradient of each product
            torch.testing.assert_close(ours, autocast, rtol=0, atol=2**-7 * ours.abs().max())
        else:
            assert torch.equal(ours, autocast)


def test_a_gate_within_another_autocast_computes_in_float32():
    built, (x, _) = router(), inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = built(x)[2]
    assert scores.dtype == torch.float32
    assert torch.equal(scores, built(x)[2])


FSDP = "--parallelism.data_parallel_shard_degree=2"
TP = "--parallelism.tensor_parallel_degree=2"
BACKEND = "--parallelism.spmd_backend="
LAYOUTS = {
    "FSDP": (2, [FSDP]),
    "EP": (2, [FSDP, "--parallelism.expert_parallel_degree=2"]),
    "FSDP, TP": (4, [FSDP, TP]),
    "FSDP, TP, partial_dtensor": (4, [FSDP, TP, f"{BACKEND}partial_dtensor"]),
    "FSDP, TP, full_dtensor": (4, [FSDP, TP, f"{BACKEND}full_dtensor"]),
    "FSDP, full checkpointing": (2, [FSDP, "activation-checkpoint:full"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mixed_precision_leaves_scores_in_float32(ranks, layout):
    """Scores in the activations' bfloat16 would be off by 2e-3, and tie."""
    num_ranks, flags = LAYOUTS[layout]
    job = ["--config", "deepseek_v3_tiny", "--training.seq_len=128", *flags]
    for gates in ranks.run(num_ranks, gate_jobs.gates, job):
        assert gates
        for x, scores, error, gradient, learns in gates:
            assert (x, scores, gradient) == (torch.bfloat16, torch.float32, torch.float32)
            assert error < 1e-6 and learns


def every_loss(padded: bool) -> list[AuxLoss.Config]:
    """Configure every loss; sequences are documents if the batch has a mask."""
    options = LOSSES | {"batch_wise": {"count_from": "scores"}}
    if padded:
        options["sequence_wise"] = {"over": "document", "max_documents": 3}
    return [AuxLoss.kinds[kind].Config(weight=0.5, **options[kind]) for kind in options]


@pytest.mark.parametrize(
    ("backend", "dtype", "lora", "padded"),
    [
        ("inductor", torch.float32, False, False),
        ("inductor", torch.float32, False, True),
        ("aot_eager", torch.bfloat16, False, True),
        ("aot_eager", torch.bfloat16, True, False),
    ],
)
def test_compiled_without_graph_breaks(backend, dtype, lora, padded):
    """The router has all losses and a quantile bias.

    The traced router equals the eager one bit for bit; compiled kernels round differently.
    """
    results = []
    for compiled in (False, True):
        built = router(
            every_loss(padded),
            expert_bias=QuantileBias.Config(num_bins=100),
            loop=TrainingLoop(padded=padded),
            dtype=dtype,
            route_norm=True,
            **GROUPS,
        )
        if lora:
            built.gate = lora_gate(built, dtype)
        if padded:
            with_mask(built, PADDED, DOCUMENTS)
        forward = torch.compile(built, fullgraph=True, backend=backend) if compiled else built
        x, bias = inputs(dtype)
        scores = forward(x, bias)[0]
        scores.square().sum().backward()
        gradients = [p.grad for p in built.gate.parameters() if p.grad is not None]
        assert len(gradients) == (2 if lora else 1)
        record = built.record
        results.append([scores, x.grad, *gradients, record.losses_A])
        results[-1] += [record.counts_MSE, record.histogram_EH]
    torch._dynamo.reset()
    rtol, atol = (0, 0) if backend == "aot_eager" else (1e-5, 1e-6)
    for eager, found in zip(*results, strict=True):
        torch.testing.assert_close(found, eager, rtol=rtol, atol=atol)


@pytest.mark.parametrize("recompute", [False, True])
def test_each_forward_is_recorded_once(recompute):
    built = router([sequence_wise()])
    x, bias = inputs()
    for _ in range(2):
        out = checkpoint(built, x, bias, use_reentrant=False)[0] if recompute else built(x, bias)[0]
        out.sum().backward()
    assert built.record.counts_MSE.sum() == 2 * ROWS * LENGTH * TOP_K
    value = built.record.losses_A.clone()
    built.step_record.finish_step(ROWS)
    assert built.record.counts_MSE.sum() == 0
    assert torch.equal(built.step_record.step_losses_NA[0], value * (1 / ROWS))
    with torch.no_grad():
        built.eval()(x, bias)
    assert built.record.counts_MSE.sum() == 0


def test_a_loss_without_its_router_is_refused():
    with pytest.raises(JobError, match="aux_losses"):
        SequenceWiseAuxLoss.Config(weight=1.0).build()


def test_an_unwired_router_with_a_loss_is_refused():
    built = router([sequence_wise()])
    built.record = built.step_record = None
    with pytest.raises(JobError, match="attach"):
        built(inputs()[0])
