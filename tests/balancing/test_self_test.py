"""The self-test names each planted fault first, no fault of a healthy model, and changes nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torchtitan.config import ParallelismConfig

from tests.support.inert_models import FAULTS, loop
from tests.support.own_loop_jobs import (
    faults_beside_a_wrong_dtype_on_rank_1,
    forward,
    norms_at_the_gates,
)
from tests.support.textbook import mean_loss
from titan_moe_lb.balancing.expert_bias import MomentumBias, QuantileBias
from titan_moe_lb.balancing.freezing import Freeze
from titan_moe_lb.balancing.losses import EntropyLoss, GlobalBatchAuxLoss, SequenceWiseAuxLoss
from titan_moe_lb.balancing.router import moe_layers_of, routers_of

HEALTHY = {
    "sequence-wise, z-loss and sign": {},
    "global batch and quantile": {
        "aux_losses": [GlobalBatchAuxLoss.Config(weight=1e-3)],
        "expert_bias": QuantileBias.Config(),
    },
    "softmax, entropy, without a bias": {
        "aux_losses": [EntropyLoss.Config(weight=1e-3)],
        "expert_bias": None,
        "score_func": "softmax",
    },
    "momentum alone, two frozen layers": {
        "aux_losses": [],
        "expert_bias": MomentumBias.Config(speed=1e-3),
        "freeze": Freeze(gate=1, bias="1-2"),
    },
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named_first(name):
    made, kind, part = FAULTS[name]
    result = made().check()
    assert not result.acts
    first = result.faults[0]
    assert (first.kind, first.part) == (kind, part)
    assert kind.replace("_", " ") in str(result) or part == "step"
    assert first.what in str(result) and first.remedy in str(result)
    # Nothing else is wrong, but what follows from a gate or a bias that is not the router's.
    others = {one.kind for one in result.faults} - {kind}
    assert others <= {"no_gradient_of_model", "bias_not_read", "bias_cannot_reach"}, others


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_model_has_no_fault(name):
    result = loop(**HEALTHY[name]).check()
    assert result.acts, result.faults
    assert "acts" in str(result)


def test_norms_are_those_of_autograd_on_the_textbooks_loss():
    """The gradient of the model's loss comes from a model without balancing."""
    weight = 1e-3
    made = loop(aux_losses=[SequenceWiseAuxLoss.Config(weight=weight)])
    plain = loop(aux_losses=[], expert_bias=None)
    plain.model.load_state_dict(made.model.state_dict(), strict=False)
    measured = made.check().measured
    plain.step()
    seen = {}
    for one in routers_of([plain.model]):
        one.register_forward_hook(lambda one, _args, out: seen.update({one.layer: out[1:]}))
    tokens = torch.randint(0, 256, (4, 64), generator=torch.Generator().manual_seed(0))
    forward(plain.model, tokens)
    for one, layer in zip(routers_of([plain.model]), measured.layers, strict=True):
        assert layer.main_norm == pytest.approx(float(one.gate.weight.grad.norm()), rel=1e-5)
        ids, scores = seen[one.layer]
        loss = weight * mean_loss("sequence_wise", None, scores, ids)
        (gradient,) = torch.autograd.grad(loss, one.gate.weight, retain_graph=True)
        assert layer.losses[0].norm == pytest.approx(float(gradient.norm()), rel=1e-4)


EP2 = ParallelismConfig(data_parallel_shard_degree=2, expert_parallel_degree=2)


def test_norms_on_two_ranks_are_those_on_one(ranks):
    """FSDP and expert parallelism, with losses of every kind; each rank has half of the rows."""
    (one,) = ranks.run(1, norms_at_the_gates)
    for norms in ranks.run(2, norms_at_the_gates, EP2):
        torch.testing.assert_close(torch.tensor(norms), torch.tensor(one), rtol=1e-4, atol=0)
    assert torch.tensor(one).min() > 0


def test_a_fault_of_one_rank_lets_no_other_wait(ranks):
    alone, broken = ranks.run(2, faults_beside_a_wrong_dtype_on_rank_1, EP2)
    assert broken == alone == ["wrong_dtype"]


def state_of(made) -> dict[str, object]:
    """Everything that a self-test could change."""
    record = routers_of([made.model])[0].step_record
    hook = made.balance._hook
    return {
        **{f"state {name}": t.clone() for name, t in made.model.state_dict().items()},
        **{f"buffer {name}": b.clone() for name, b in made.model.named_buffers()},
        **{
            f"gradient {name}": None if p.grad is None else p.grad.clone()
            for name, p in made.model.named_parameters()
        },
        "record": [
            t.detach().clone()
            for thing in (record, record.scores)
            for t in vars(thing or object).values()
            if torch.is_tensor(t)
        ],
        "host": (record.rows, record.forwards, record.tokens, record.learns, hook.finished_steps),
        "progress": (hook.weights, hook.announced_rows, made.balance.finished_steps),
        "optimizer": str(made.optimizer.state_dict()),
        "random": torch.random.get_rng_state(),
        "training": [module.training for module in made.model.modules()],
    }


def same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, list):
        return all(map(same, one, other))
    return one == other


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_changed_between_two_steps(fails):
    """Also if the function fails; the next steps are those of a loop without the test."""
    results = []
    for checks in (False, True):
        made = loop(
            aux_losses=[GlobalBatchAuxLoss.Config(weight=0.1)], expert_bias=QuantileBias.Config()
        )
        torch.manual_seed(3)
        history = []
        for number in range(3):
            made.balance.begin_step(4)
            made.step()
            if number == 1 and checks:  # with gradients, in the middle of a step
                before, step = state_of(made), made.step
                if fails:
                    calls = []

                    def fail(step=step, calls=calls) -> None:
                        step()
                        calls.append(None)
                        if len(calls) > 2:
                            raise RuntimeError("out of memory")

                    with pytest.raises(RuntimeError, match="out of memory"):
                        made.balance.check(fail, made.optimizer)
                else:
                    assert made.check().acts
                after = state_of(made)
                assert before.keys() == after.keys()
                for name, value in before.items():
                    assert same(after[name], value), name
            made.optimizer.step()
            made.optimizer.zero_grad()
            history.append({**made.balance.metrics(), "random": float(torch.rand(()))})
        results.append((history, made.model.state_dict()))
    (history, state), (checked, state_checked) = results
    for one, other in zip(history, checked, strict=True):
        assert one.keys() == other.keys()
        assert all(one[name] == other[name] or math.isnan(one[name]) for name in one)
    assert all(torch.equal(state[name], state_checked[name]) for name in state)


def test_a_bias_reaches_as_far_as_its_choice_says():
    """The share of moved choices is that of a top-k in plain torch, on recorded scores."""
    made = loop(aux_losses=[])
    seen = {}
    hooks = [
        one.register_forward_hook(lambda one, _args, out: seen.update({one.layer: out[1:]}))
        for one in routers_of([made.model])
    ]
    forward(
        made.model.eval(),
        torch.randint(0, 256, (4, 64), generator=torch.Generator().manual_seed(0)),
    )
    for hook in hooks:
        hook.remove()
    made.model.train()
    result = made.check()
    layer = moe_layers_of([made.model])[0]
    ids, scores = seen[layer.router.layer]
    counts = torch.bincount(ids.flatten(), minlength=8)
    delta = 1e-3 * torch.sign(counts.sum() - 8 * counts)
    delta = 1e4 * (delta - delta.mean())
    groups = (scores + delta).unflatten(-1, (layer.router.num_expert_groups or 1, -1))
    assert result.measured.layers[0].bias.delta == pytest.approx(float(delta.abs().max()) / 1e4)
    if layer.router.num_expert_groups is None:
        moved = torch.bincount(groups.flatten(-2).topk(2, -1).indices.flatten(), minlength=8)
        share = float((moved - counts).abs().sum() / 2 / counts.sum())
        assert result.measured.layers[0].bias.moved_share == pytest.approx(share)
