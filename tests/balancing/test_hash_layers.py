"""Layers that route by token id are counted, and nothing balances them."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.support.hash_layers import HashRouter, counts_of_two_ranks, spec_with_hash_layer
from tests.support.own_loop_jobs import forward, initialised
from titan_moe_lb.balancing.expert_bias import FrozenBias, QuantileBias
from titan_moe_lb.balancing.forced_routing import RoundRobin
from titan_moe_lb.balancing.freezing import Freeze
from titan_moe_lb.balancing.losses import GlobalBatchAuxLoss, RouterZLoss
from titan_moe_lb.balancing.router import LoadBalancedRouter, routers_of
from titan_moe_lb.errors import JobError
from titan_moe_lb.own_loop.attach import attach
from titan_moe_lb.wiring.model_spec import balanced

LOSSES = [GlobalBatchAuxLoss.Config(weight=0.1), RouterZLoss.Config(weight=0.01)]


def built(again: bool = False):
    arguments = {"aux_losses": LOSSES, "expert_bias": QuantileBias.Config(num_bins=20)}
    spec = spec_with_hash_layer(**arguments)
    return initialised(balanced(spec, **arguments) if again else spec)


@pytest.mark.parametrize("again", [False, True])
def test_hash_layers_are_counted_and_not_balanced(again):
    model = built(again)
    hashed, *others = routers_of([model])
    assert isinstance(hashed, HashRouter) and "layers.1.moe.router.tid2eid" in model.state_dict()
    assert [type(one) for one in others] == [LoadBalancedRouter] * 2
    assert model.layers["1"].moe.expert_bias_E is None
    balance = attach(model, rows_per_step=4, router_gradients_every=1)
    batches = torch.randint(0, 2048, (2, 2, 32), generator=torch.Generator().manual_seed(0))
    for tokens in batches:
        hashed.input_ids = tokens
        forward(model, tokens).float().square().mean().backward()
    with torch.no_grad():  # not counted
        forward(model, tokens)
    balance.close_step()
    load = balance.load()
    expected = torch.bincount(hashed.tid2eid[batches].flatten(), minlength=8)
    assert load.layers == (1, 2, 3) and load.counts_ME[0].tolist() == expected.tolist()
    assert load.counts_ME.sum(1).tolist() == [2 * 128] * 3
    of_losses = [loss._owner.metric_name for loss in LOSSES]
    for name in (*of_losses, "main_gradient_squared", "aux_gradient_squared", "bias_largest_step"):
        values = load.layer_columns[name]
        assert [math.isnan(value) for value in values] == [True, False, False]
    assert math.isfinite(balance.metrics()["moe/z_loss"])
    assert not torch.equal(model.layers["2"].moe.expert_bias_E, torch.zeros(8))


@pytest.mark.parametrize("experts", [1, 2])
def test_hash_layers_are_counted_once_on_two_ranks(ranks, experts):
    """FSDP, with and without expert parallelism: tokens of both ranks, each counted once."""
    results = ranks.run(2, counts_of_two_ranks, experts)
    ids = torch.cat([batches.flatten() for _counts, batches, _moved in results])
    expected = torch.bincount(torch.stack([ids * 7 % 8, (ids * 7 + 3) % 8]).flatten(), minlength=8)
    for counts, _batches, moved in results:
        assert counts[0] == expected.tolist()
        assert [sum(row) for row in counts] == [2 * len(ids)] * 3
        assert len(moved) == 2  # not that of the hash layer
        for bias, row in zip(moved, counts[1:], strict=True):
            sign = torch.sign(torch.tensor([sum(row) - 8 * count for count in row]))
            torch.testing.assert_close(torch.tensor(bias), 0.1 * (sign - sign.float().mean()))


def test_a_hash_layer_is_the_users_own():
    """Results and gradients are those of the user's class, bit for bit."""
    model = built()
    hashed = routers_of([model])[0]
    attach(model, rows_per_step=2)
    plain = HashRouter(hashed.config)
    plain.load_state_dict({name: t for name, t in hashed.state_dict().items() if "aux" not in name})
    x = torch.randn(2, 8, 64)
    results = []
    for router in (hashed, plain):
        router.input_ids = torch.arange(16).view(2, 8)
        y = x.clone().requires_grad_()
        hashed.step_record.learns = True
        scores, ids, full = router(y)
        (scores.square().sum() + full.sum()).backward()
        results.append((scores, ids, full, y.grad, router.gate.weight.grad))
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


def test_a_recomputed_forward_is_counted_once():
    hashed = routers_of([model := built()])[0]
    attach(model, rows_per_step=2)
    hashed.step_record.learns = True
    hashed.input_ids = torch.arange(16).view(2, 8)
    y = torch.randn(2, 8, 64, requires_grad=True)
    checkpoint(hashed, y, use_reentrant=False)[0].sum().backward()
    assert hashed.record.counts_MSE.sum() == 32


def test_counting_compiles_without_graph_breaks():
    hashed = routers_of([model := built()])[0]
    attach(model, rows_per_step=2)
    hashed.step_record.learns = True
    hashed.input_ids = torch.arange(16).view(2, 8)
    compiled = torch.compile(hashed, backend="aot_eager", fullgraph=True)
    compiled(torch.randn(2, 8, 64, requires_grad=True))[0].sum().backward()
    expected = torch.bincount(hashed.tid2eid[:16].flatten(), minlength=8)
    assert hashed.record.counts_MSE.sum(dim=(0, 1)).tolist() == expected.tolist()


def test_a_frozen_bias_leaves_hash_layers_alone():
    model = initialised(
        spec_with_hash_layer(expert_bias=QuantileBias.Config(), freeze=Freeze(bias="all"))
    )
    hashed, *others = [layer.moe for layer in model.layers.values() if hasattr(layer, "moe")]
    assert hashed.expert_bias_E is None
    assert {type(moe.router.expert_bias) for moe in others} == {FrozenBias}


def test_forced_routing_of_a_hash_layer_is_refused():
    with pytest.raises(JobError, match="forced_routing"):
        spec_with_hash_layer(forced_routing=RoundRobin.Config())
