"""Frozen gates, biases and losses by layer."""

from __future__ import annotations

import math

import pytest
import torch

from model_registry.deepseek_v3 import model_registry
from tests.support.freeze_jobs import train_parts
from tests.support.own_loop_jobs import forward, initialised
from tests.support.routers import inputs, router, sequence_wise, upstream_router
from tests.support.textbook import mean_loss
from titan_moe_lb.balancing.freezing import Freeze
from titan_moe_lb.balancing.losses import GlobalBatchAuxLoss, RouterZLoss, SequenceWiseAuxLoss
from titan_moe_lb.balancing.router import routers_of
from titan_moe_lb.errors import JobError
from titan_moe_lb.job import job_config
from titan_moe_lb.own_loop.attach import attach
from titan_moe_lb.rules import validate_here

TINY = [
    "--config=deepseek_v3_tiny",
    "--training.seq_len=64",
    "--training.local_batch_size=2",
    "--training.steps=2",
    '--model.aux_losses=[{type="sequence_wise", weight=0.1}, {type="z_loss", weight=0.01}]',
]
COMPILED = ["--compile.enable", "--compile.backend=aot_eager", "--compile.components=model"]
LAYOUTS = {
    "FSDP, full checkpointing, compiled": [
        "activation-checkpoint:full",
        *COMPILED,
    ],
    "FSDP, multi-token prediction": ["--model.num_mtp_layers=1"],
    "PP ZBV": [
        "--parallelism.pipeline_parallel_degree=2",
        "--parallelism.pipeline_parallel_schedule=ZBVZeroBubble",
    ],
}
NUMBERS = {"layers.1.moe": 1, "layers.2.moe": 2, "layers.4.moe": 4, "mtp_layers.0.moe": 6}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_frozen_parts_keep_every_bit(ranks, layout):
    """Two ranks: the other layers learn, all tokens are counted, and losses that are off have no
    value."""
    mtp = "multi-token" in layout
    gate = '["1", "mtp"]' if mtp else '"1"'
    freeze = f'--model.freeze={{gate={gate}, bias="2-3", losses=[2]}}'
    flags = [*TINY, freeze, *LAYOUTS[layout]]
    # A subcommand of tyro ends the flags before it.
    flags.sort(key=lambda flag: flag.startswith("activation-"))
    trained = ranks.run(2, train_parts, flags)
    layers = [1, 2, 3] + [4] * mtp
    tokens = (2 if "PP" in layout else 4) * 64 * 2  # rows, their length, top 2
    frozen = {1, 4} if mtp else {1}
    for rank in trained:
        for layer, (before, after) in rank.gates.items():
            assert torch.equal(before, after) == (layer in frozen), layer
        for layer, (before, after) in rank.biases.items():
            assert torch.equal(before, after) == (layer in (2, 3)), layer
        assert list(rank.layers) == layers
        assert {sum(counts) for counts in rank.counts_ME} == {tokens}
        for name in ("seq_load_balancing_loss", "z_loss"):
            off = [math.isnan(value) for value in rank.losses[name]]
            assert off == [layer in frozen | {2} for layer in layers]
    assert set().union(*(rank.gates for rank in trained)) == set(layers)


@pytest.mark.parametrize("losses", [[sequence_wise(weight=30.0)], [RouterZLoss.Config(weight=3.0)]])
def test_without_its_losses_a_layer_is_torchtitans(losses):
    results = []
    for make in (upstream_router, lambda: router(losses, frozen=frozenset({"losses"}))):
        built = make()
        x, bias = inputs()
        scores, ids, full = built(x, bias)
        (scores.square().sum() + full.sum()).backward()
        results.append((scores, ids, full, x.grad, built.gate.weight.grad))
    assert built.record.counts_MSE.sum() == ids.numel()
    for upstream, ours in zip(*results, strict=True):
        assert torch.equal(upstream, ours)


def gradients(model, main, losses=()):
    (main + sum(losses)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_only_the_losses_that_are_on_reach_the_model():
    """Against autograd on the textbook's loss of the one layer whose losses are on."""
    weight, tokens = 0.3, torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(0))
    loss = [SequenceWiseAuxLoss.Config(weight=weight)]
    model = initialised(model_registry("tiny", aux_losses=loss, freeze=Freeze(gate=1, losses=[2])))
    attach(model, rows_per_step=2)
    found = gradients(model, forward(model, tokens).float().square().mean())

    plain = initialised(model_registry("tiny", aux_losses=[], expert_bias=None))
    seen = {}
    for one in routers_of([plain]):
        one.register_forward_hook(lambda one, _args, out: seen.update({one.layer: out[1:]}))
    main = forward(plain, tokens).float().square().mean()
    ids, scores = seen[3]
    expected = gradients(plain, main, [weight * mean_loss("sequence_wise", None, scores, ids)])
    assert expected.keys() - found.keys() == {"layers.1.moe.router.gate.weight"}
    for name, gradient in found.items():
        error = (gradient - expected[name]).abs().max()
        assert error <= 1e-5 * expected[name].abs().max(), name


def test_layers_by_number_range_and_kind():
    freeze = Freeze(gate=["1-4", "mtp"], bias="all", losses=2)
    every = {1, 2, 4, 6}
    assert freeze.resolve(NUMBERS) == {"gate": every, "bias": every, "losses": every}
    freeze = Freeze(gate="2-3", losses=["mtp"])
    assert freeze.resolve(NUMBERS) == {"gate": {2}, "bias": set(), "losses": {2, 6}}
    assert Freeze(bias="0-1").resolve(NUMBERS)["bias"] == {1}


@pytest.mark.parametrize("layers", [0, 3, 7, "2-7", "3-3", "4-2", "two", "-1", [1, 9], ""])
@pytest.mark.parametrize("part", ["gate", "bias", "losses"])
def test_a_layer_that_does_not_exist_is_refused(part, layers):
    with pytest.raises(JobError, match=f"freeze.{part} "):
        Freeze(**{part: layers}).resolve(NUMBERS)


def test_layers_of_a_model_without_prediction_of_more_tokens():
    with pytest.raises(JobError, match="freeze.gate .*mtp"):
        Freeze(gate="mtp").resolve({"layers.1.moe": 1})


def test_frozen_losses_keep_counting():
    """The counts of a global-batch loss go on, for the day on which it is on again."""
    built = router([GlobalBatchAuxLoss.Config(weight=1.0)], frozen=frozenset({"losses"}))
    built(inputs()[0])
    assert built.needs_step_counts and built.record.counts_MSE.sum() > 0


def test_documents_of_losses_that_are_all_off_are_expected():
    loss = SequenceWiseAuxLoss.Config(weight=0.1, over="document")
    model = initialised(model_registry("tiny", aux_losses=[loss], freeze=Freeze(losses="all")))
    attach(model, rows_per_step=2)
    tokens, documents = torch.zeros(2, 32, dtype=torch.int64), torch.zeros(2, 32, dtype=torch.int64)
    forward(model, tokens, document_ids=documents).float().square().mean().backward()
    with pytest.raises(JobError, match="padded"):
        forward(model, tokens, valid_tokens=documents.bool())


def test_resume_with_other_frozen_parts(ranks, tmp_path):
    """Freezing goes on from any checkpoint; a gate that was frozen has no state to learn from."""
    saved = ["--checkpoint.enable", "--checkpoint.no-last-save-model-only"]
    flags = [*TINY, *saved, "--lr_scheduler.total_steps=6", f"--dump_folder={tmp_path}"]
    frozen = "--model.freeze={gate=1, bias=1}"
    ranks.run(1, train_parts, flags)
    (second,) = ranks.run(1, train_parts, [*flags, frozen, "--training.steps=4"], first_step=3)
    for pairs in (second.gates, second.biases):
        assert [torch.equal(*pairs[layer]) for layer in (1, 2, 3)] == [True, False, False]
    with pytest.raises(JobError, match="freeze.gate"):
        validate_here(job_config.load([*flags, "--training.steps=6"]))
