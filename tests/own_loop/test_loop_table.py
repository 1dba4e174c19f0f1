"""Tests of the table in docs/reference/own_loop.md: each row is a case here, and each case a
row."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torchtitan.config import TrainingConfig
from torchtitan.config.override import derive
from torchtitan.distributed.activation_checkpoint import MemoryBudgetAC
from torchtitan.models.common.moe import TokenChoiceTopKRouter

from model_registry.deepseek_v3 import model_registry
from tests.support import loop_rank_jobs
from tests.support.loop_model import SIGN, SPEED, Loop, MoELayers, error_of
from titan_moe_lb.balancing.expert_bias import (
    MomentumBias,
    ProportionalBias,
    QuantileBias,
    QuantileTrendBias,
    SignBias,
)
from titan_moe_lb.balancing.losses import BatchWiseAuxLoss, RouterZLoss, SequenceWiseAuxLoss
from titan_moe_lb.errors import JobError
from titan_moe_lb.own_loop.attach import attach
from titan_moe_lb.own_loop.build import build_model

CASES: dict[str, Callable] = {}
"""Cases by the first column of the page.

The case of a refused row raises ``JobError``; the case of a correct row compares.
"""


def case(row: str) -> Callable:
    def enter(check: Callable) -> Callable:
        CASES[row] = check
        return check

    return enter


def rows_of_the_page() -> dict[str, str]:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "own_loop.md").read_text()
    table = page.split("## What is refused, and what is right")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (.*?) \| (right|refused)(.*?) \|$", table, re.MULTILINE)
    return {first: verdict for first, verdict, _how in rows}


ROWS = rows_of_the_page()


def test_every_case_is_a_row():
    assert set(CASES) == set(ROWS)


@pytest.mark.parametrize("row", ROWS)
def test_row(row, request):
    check = CASES[row]
    arguments = [request.getfixturevalue("ranks")] if check.__code__.co_argcount else []
    if ROWS[row] == "right":
        check(*arguments)
        return
    with pytest.raises(JobError) as error:
        check(*arguments)
    assert "\n" not in str(error.value)


def train(model: MoELayers) -> None:
    model(torch.randn(2, 8, 64)).sum().backward()


# attach()


@case("`attach()` is forgotten, and a rule moves the bias")
def _():
    train(MoELayers())


@case("`attach()` is forgotten, and there is an aux loss")
def _():
    train(MoELayers([SequenceWiseAuxLoss.Config(weight=1.0)], rule=None))


@case("`attach()` after forwards without gradients or in `eval()`")
def _():
    model = MoELayers()
    with torch.no_grad():
        model(torch.randn(2, 8, 64))
    model.eval()(torch.randn(2, 8, 64))
    loop = Loop(model.train())
    loop.step()
    loop.assert_right()


@case("an unknown `score_func`")
def _():
    attach(MoELayers(change=lambda router: setattr(router, "score_func", "relu")))


@case("two losses of one kind")
def _():
    attach(MoELayers([SequenceWiseAuxLoss.Config(weight=weight) for weight in (1.0, 1e-3)]))


@case("layers with other losses than the first")
def _():
    def change(router):
        if router.layer == 2:
            router.aux_losses[0].weight = 1e-3

    attach(MoELayers([SequenceWiseAuxLoss.Config(weight=1.0)], change=change))


@case("a group limit that leaves a token fewer experts than `top_k`")
def _():
    def change(router):
        router.num_expert_groups, router.num_limited_groups, router.top_k = 4, 1, 3

    attach(MoELayers(change=change))


@case("a layer whose router is torchtitan's own")
def _():
    model = MoELayers()
    layer = next(iter(model.layers.values()))
    layer.router = derive(layer.router.config, TokenChoiceTopKRouter.Config).build()
    attach(model)


@case("`batch_wise` in a pipeline")
def _(ranks):
    raise_the_one_error(ranks.run(2, loop_rank_jobs.attach_to_a_stage, BatchWiseAuxLoss))


@case("a step of a pipeline without `begin_step(rows)`, and there is an aux loss")
def _(ranks):
    raise_the_one_error(ranks.run(2, loop_rank_jobs.attach_to_a_stage, SequenceWiseAuxLoss))


@case("`build_model` with memory-budget checkpointing")
def _():
    build_model(
        model_registry("tiny"),
        training=TrainingConfig(seq_len=64),
        activation_checkpoint=MemoryBudgetAC.Config(),
    )


@case("a router that two layers share")
def _():
    twice = Loop(MoELayers())
    twice.model.run = lambda layer, x: layer(layer(x))
    twice.forward_and_backward()
    twice.optimizer.step()
    counted = [
        sum(np.bincount(one.ravel(), minlength=8) for one in chosen).tolist()
        for chosen in twice.model.chosen.values()
    ]
    assert twice.balance.load().counts_ME.tolist() == counted

    model = MoELayers()
    model.layers["1"].router = model.layers["2"].router
    attach(model)


@case("two models, each with its `attach()`, in turn in one process")
def _():
    loops = [Loop(), Loop()]
    for seed in range(3):
        for number, loop in enumerate(loops):
            loop.step(seed + 5 * number)
        for loop in loops:
            loop.assert_right()


@case(
    "an evaluation, or a generation under `torch.no_grad()` in `train()` mode, between the micro-batches of a step"
)
def _():
    found = []
    for between in (False, True):
        loop = Loop(MoELayers([SequenceWiseAuxLoss.Config(weight=1.0)]), rows_per_step=4)
        loop.forward_and_backward(0)
        if between:
            loop.model.eval()(torch.randn(4, 8, 64))
            loop.model.train()
            with torch.no_grad():
                for length in range(1, 4):
                    loop.model(torch.randn(1, length, 64))
        loop.forward_and_backward(1)
        found.append(learned(loop))
    assert_equal(*found)


@case("`load_state_dict()` after `attach()`, also between forward and step")
def _():
    saved, loop = Loop(), Loop()
    saved.step()
    loop.step(7)
    loop.model.load_state_dict(saved.model.state_dict())
    loop.by_hand = {name: bias.copy() for name, bias in saved.model.biases.items()}
    loop.step(1)
    loop.assert_right()

    loop.forward_and_backward(2)
    loop.model.load_state_dict(saved.model.state_dict())
    loop.optimizer.step()
    for name, bias_E in loop.model.biases.items():
        counts_E = np.bincount(loop.model.chosen[name][-1].ravel(), minlength=8)
        signs_E = np.sign(counts_E.mean() - counts_E)
        expected_E = saved.model.biases[name] + SPEED * (signs_E - signs_E.mean())
        np.testing.assert_allclose(bias_E, expected_E, rtol=0, atol=1e-6)


@case("`torch.compile(model)` after `attach()`")
def _():
    found = []
    for compiled in (False, True):
        loop = Loop(MoELayers([SequenceWiseAuxLoss.Config(weight=1.0)]), rows_per_step=4)
        for layer in loop.model.layers.values():  # which note with numpy what is chosen
            layer.router._forward_hooks.clear()
        model = torch.compile(loop.model, backend="aot_eager") if compiled else loop.model
        for seed in range(2):
            generator = torch.Generator().manual_seed(seed)
            x = torch.randn(2, 8, 64, generator=generator).requires_grad_()
            model(x).square().mean().backward()
        found.append(learned(loop))
    assert_equal(*found, rtol=1e-4)


def learned(loop: Loop) -> list[np.ndarray]:
    """Step the optimizer; return the counts of the step, the biases and the gradients."""
    loop.optimizer.step()
    gradients = [p.grad.numpy() for p in loop.model.parameters() if p.grad is not None]
    return [loop.balance.load().counts_ME, *loop.model.biases.values(), *gradients]


def assert_equal(one: list[np.ndarray], other: list[np.ndarray], rtol: float = 0.0) -> None:
    for first, second in zip(one, other, strict=True):
        np.testing.assert_allclose(first, second, rtol=rtol, atol=1e-6 if rtol else 0)


@case("layers that are called past the model that `attach()` got")
def _():
    loop = Loop()
    loop.model.layers["1"](torch.randn(2, 8, 64))


# A model that is moved or cast


def after(change: Callable[[MoELayers], object]) -> None:
    """Change the model after a step, and check the next two."""
    loop = Loop()
    loop.step(0)
    loop.assert_right()
    change(loop.model)
    for seed in (1, 2):
        loop.step(seed)
        loop.assert_right()


@case("tensors in new storage after `attach()`, as `.cpu().cuda()` gives")
def _():
    after(lambda model: model._apply(torch.Tensor.clone))


@case("`model.double().float()` after `attach()`")
def _():
    after(lambda model: model.double().float())


@case("`model.to(torch.bfloat16)` after `attach()`")
def _():
    after(lambda model: model.to(torch.bfloat16))


@case("`model.to(torch.bfloat16)` before `attach()`, with a learned bias")
def _():
    model = MoELayers()
    for layer in model.layers.values():
        layer.expert_bias_E.copy_(torch.linspace(-0.5, 0.5, 8))
    learned = model.biases
    loop = Loop(model.to(torch.bfloat16))
    for name, bias in model.biases.items():
        np.testing.assert_array_equal(bias, learned[name])
    for seed in range(3):
        loop.step(seed)
    loop.assert_right()


@case("some layers cast to bfloat16")
def _():
    def change(model):
        last = list(model.layers)[-1]
        model.layers[last].to(torch.bfloat16)
        model.run = lambda layer, x: layer(x.to(next(layer.parameters()).dtype))

    after(change)


@case("a model on another device than at `attach()`")
def _():
    loop = Loop()
    loop.model.to("meta")
    loop.forward_and_backward()


@case("an expert bias loaded in bfloat16 with `assign=True`")
def _():
    loop = Loop()
    loop.step()
    saved = {name: t.to(torch.bfloat16) for name, t in loop.model.state_dict().items()}
    loop.model.load_state_dict(saved, assign=True)
    loop.step()


# A model that is copied


@case("a copy of the model made after `attach()`, as a reference")
def _(ranks):
    """Check a copy, which shares the process groups, because they cannot be copied."""
    after(lambda model: copy.deepcopy(model).eval()(torch.randn(2, 8, 64)))
    assert ranks.run(2, loop_rank_jobs.copy_after_attach) == [True, True]


@case("a copy of the model made after `attach()` that learns")
def _():
    copied = copy.deepcopy(Loop().model)
    assert error_of(lambda: copied.layers["1"](torch.randn(2, 8, 64))) is not None
    train(copied)


@case("a copy that gets a token mask between forward and backward of its model")
def _():
    """Reentrant blocks read the mask again in the backward."""
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[:, 5:] = False
    x = torch.randn(2, 8, 64)
    found = []
    for copied in (False, True):
        loop = Loop(MoELayers([SequenceWiseAuxLoss.Config(weight=1.0)]), padded=True)
        loop.model.run = lambda layer, x: checkpoint(layer, x, use_reentrant=True)
        loop.balance.begin_step(2)
        loss = loop.model(x.clone().requires_grad_(), valid_tokens=mask).square().mean()
        if copied:
            with torch.no_grad():
                copy.deepcopy(loop.model)(x, valid_tokens=torch.ones_like(mask))
        loss.backward()
        loop.optimizer.step()
        gates = [layer.router.gate.weight.grad for layer in loop.model.layers.values()]
        found.append((loop.balance.load().counts_ME, *gates))
    for without, beside in zip(*found, strict=True):
        np.testing.assert_array_equal(without, beside)


# Checkpointing of one's own


@pytest.mark.parametrize("seeds", [(0,), (0, 1)], ids=["one micro-batch", "two"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_count_once_and_teach_as_without(reentrant, seeds):
    """The case includes two forwards before the first backward."""
    found = []
    for checkpointed in (False, True):
        loop = Loop(MoELayers([SequenceWiseAuxLoss.Config(weight=1.0)]))
        if checkpointed:
            loop.model.run = lambda layer, x: checkpoint(layer, x, use_reentrant=reentrant)
        loop.balance.begin_step(2 * len(seeds))
        inputs = [
            torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(seed)).requires_grad_()
            for seed in seeds
        ]
        for output in [loop.model(x) for x in inputs]:
            output.square().mean().backward()
        loop.optimizer.step()
        gates = [layer.router.gate.weight.grad for layer in loop.model.layers.values()]
        found.append((loop.balance.load(), loop.model.biases, gates, loop.balance.metrics()))
    (load, biases, gates, metrics), (found_load, found_biases, found_gates, found_metrics) = found
    assert found_load.counts_ME.tolist() == load.counts_ME.tolist()
    assert found_metrics == pytest.approx(metrics)
    for name, expected in biases.items():
        np.testing.assert_array_equal(found_biases[name], expected)
        assert np.abs(expected).max() > 0
    for expected, gate in zip(gates, found_gates, strict=True):
        torch.testing.assert_close(gate, expected, rtol=1e-5, atol=1e-7)


@case("blocks under `torch.utils.checkpoint` with `use_reentrant=False`")
def _():
    test_checkpointed_blocks_count_once_and_teach_as_without(False, (0, 1))


@case("blocks under `torch.utils.checkpoint` with `use_reentrant=True`")
def _():
    test_checkpointed_blocks_count_once_and_teach_as_without(True, (0, 1))


@case("a block that a forward that learns runs under `torch.no_grad()`")
def _():
    loop = Loop()

    def run(layer, x_BLD):
        with torch.set_grad_enabled(layer is not loop.model.layers["1"]):
            return layer(x_BLD)

    loop.model.run = run
    for seed in (0, 1):
        loop.step(seed)
        loop.assert_right()


@case("the whole model under `use_reentrant=False`")
def _():
    loop = Loop()
    x_BLD = torch.randn(2, 8, 64, requires_grad=True)
    checkpoint(loop.model, x_BLD, use_reentrant=False).sum().backward()
    chosen = next(iter(loop.model.chosen.values()))[0]
    loop.optimizer.step()
    assert loop.balance.load().counts_ME[0].tolist() == np.bincount(chosen.ravel()).tolist()


@case("the whole model under `use_reentrant=True`")
def _():
    loop = Loop()
    x_BLD = torch.randn(2, 8, 64, requires_grad=True)
    checkpoint(loop.model, x_BLD, use_reentrant=True).sum().backward()


# Steps without tokens


RULES = (
    SignBias.Config(speed=1e-2),
    ProportionalBias.Config(speed=1e-1),
    MomentumBias.Config(speed=1e-2),
    QuantileBias.Config(),
    QuantileTrendBias.Config(),
)


def states(model: MoELayers) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in model.named_buffers() if name.endswith("_E")}


@case("`optimizer.step()` without a forward")
def _():
    for rule in RULES:
        loop = Loop(MoELayers([SequenceWiseAuxLoss.Config(weight=1.0)], rule), rows_per_step=2)
        for seed in (0, 1):
            loop.forward_and_backward(seed)
            loop.optimizer.step()
        assert loop.balance.metrics()["moe/max_violation"] > 0
        before = states(loop.model)
        loop.optimizer.step()
        for name, state in states(loop.model).items():
            assert torch.equal(state, before[name]), (rule, name)
        assert loop.balance.metrics() == {}
        loop.forward_and_backward(2)
        loop.optimizer.step()
        assert all(state.isfinite().all() for state in states(loop.model).values())
        assert loop.balance.finished_steps == 4


@case("a forward without a token beside others, with an aux loss")
def _():
    loss = SequenceWiseAuxLoss.Config(weight=1.0)
    loop = Loop(MoELayers([loss, RouterZLoss.Config(weight=1.0)]), rows_per_step=4)
    loop.model(torch.randn(2, 0, 64).requires_grad_()).sum().backward()
    loop.step()
    for layer in loop.model.layers.values():
        assert layer.router.gate.weight.grad.isfinite().all()
    loop.assert_right()


@case("two optimizers, and the second steps without a forward")
def _():
    loop = Loop()
    model = MoELayers()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.0) for _ in range(2)]
    loop.model, loop.by_hand = model, model.biases
    loop.optimizer, loop.balance = optimizers[0], attach(model, optimizers)
    for seed in (0, 1):
        loop.step(seed)
        optimizers[1].step()
        loop.assert_right()


@case("a step without a forward on one rank of two")
def _(ranks):
    with_it, without = ranks.run(2, loop_rank_jobs.forward_on_rank_0_alone)
    assert with_it == without
    assert with_it["moved"] and with_it["metrics"][0]["moe/max_violation"] > 0
    assert with_it["metrics"][1] == {}


@case("a step that a rank does not take, without a collective in the step")
def _(ranks):
    raise_the_one_error(ranks.run(2, loop_rank_jobs.step_on_rank_0_alone))


@case("`begin_step(rows)` with another number on another rank")
def _(ranks):
    raise_the_one_error(ranks.run(2, loop_rank_jobs.announce_other_rows))


def raise_the_one_error(by_rank: list[str | None]) -> None:
    first, *others = by_rank
    assert all(other == first for other in others), by_rank
    if first is not None:
        raise JobError(first)


# Numbers that are none


def breaking(loop: Loop) -> torch.Tensor:
    """Set the gate of layer 2 to NaN; return its earlier value."""
    weight = loop.model.layers["2"].router.gate.weight
    whole = weight.detach().clone()
    with torch.no_grad():
        weight[3] = float("nan")
    return whole


@case("NaN in the weight of a gate")
def _():
    loop = Loop()
    loop.step()
    breaking(loop)
    message = error_of(loop.balance.metrics)
    assert message is not None and "layer 2" in message
    raise JobError(message)


@case("NaN in the weight of a gate in a step that is skipped")
def _():
    for rule in RULES:
        loops = [Loop(MoELayers(rule=copy.deepcopy(rule))) for _ in range(2)]
        for loop in loops:
            loop.forward_and_backward(0)
            loop.optimizer.step()
        broken = loops[1]
        whole = breaking(broken)
        broken.forward_and_backward(1)
        broken.balance.skip_step()
        with torch.no_grad():
            broken.model.layers["2"].router.gate.weight.copy_(whole)
        for loop in loops:
            loop.forward_and_backward(2)
            loop.optimizer.step()
        expected = states(loops[0].model)
        for name, state in states(broken.model).items():
            assert torch.equal(state, expected[name]), (rule, name)


# Processes


@case("`attach()` before `DistributedDataParallel(model)`, which copies the buffers of rank 0")
def _(ranks):
    by_rank = ranks.run(2, loop_rank_jobs.distributed_data_parallel_after_attach)
    counts = sum(np.array(found["own"]) for found in by_rank)
    assert by_rank[0]["own"] != by_rank[1]["own"]
    for found in by_rank:
        assert found["counts"] == counts.tolist()
        of_rows = np.sum([rank["own_loss"] for rank in by_rank], axis=0)
        assert found["loss"] == pytest.approx(of_rows / 8, rel=1e-5)


@pytest.mark.parametrize("wrong", [{"rows_per_step": 0}, {"optimizer": []}])
def test_a_refused_attach_leaves_no_trace(wrong):
    """The next attach() of the same model is correct."""
    model = MoELayers(rule=SIGN)
    with pytest.raises(JobError):
        attach(model, **wrong)
    Loop(model).step()
