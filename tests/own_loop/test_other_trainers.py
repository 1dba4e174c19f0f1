"""Tests of the trainers in torchtitan's experiments: counts, aux gradient and bias, against its own
model."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torchtitan.config import ParallelismConfig
from transformers import Qwen3MoeConfig

from tests.support.other_trainers import (
    MICRO_BATCHES,
    STEPS,
    Seen,
    fault_tolerant_trainer,
    forge_engine,
    forge_engine_as_it_is,
    frozen_transformers_trainer,
    graph_trainer,
    policy_trainer,
    transformers_trainer,
)
from titan_moe_lb import JobError, balanced, balanced_transformers

EP2 = ParallelismConfig(data_parallel_shard_degree=2, expert_parallel_degree=2)
CASES = {
    "reinforcement learning, EP": (2, policy_trainer, (EP2,), (EP2,)),
    "graph trainer, eager": (1, graph_trainer, (), (None,)),
    "graph trainer, aot_fx_trace": (1, graph_trainer, (), ("aot_fx_trace",)),
    "graph trainer, graph passes": (1, graph_trainer, (), ("aot_fx_trace", True)),
    "fault-tolerant": (1, fault_tolerant_trainer, (), ()),
    "forge": (1, forge_engine, (), ()),
}


@pytest.fixture(scope="module", autouse=True)
def processes_of_their_own(ranks):
    """Run these tests in their own processes.

    graph_trainer's import makes torch's BlockMask a pytree, which context parallelism then takes
    apart.
    """
    yield
    ranks.start_anew()


@pytest.mark.parametrize("case", CASES)
def test_trainer_balances(ranks, case):
    num_ranks, train, own_arguments, arguments = CASES[case]
    own = ranks.run(num_ranks, train, False, *own_arguments)
    check(own, ranks.run(num_ranks, train, True, *arguments))


def check(own: list[Seen], found: list[Seen]) -> None:
    """Check against the routers of torchtitan's own model in the same trainer."""
    assert len(own[0].counts) == STEPS and own[0].counts[0] != own[0].counts[1]
    for seen in found:
        assert seen.counts == own[0].counts
        assert seen.biases == own[0].biases
        assert max(map(max, seen.biases[-1])) > 0
    textbooks = torch.stack([torch.stack(seen.textbook_gradients) for seen in own])
    expected = textbooks.mean(dim=0).unflatten(0, (STEPS, MICRO_BATCHES)).mean(dim=1)
    added = torch.stack(found[0].gate_gradients) - torch.stack(own[0].gate_gradients)
    assert expected.abs().max() > 0
    torch.testing.assert_close(added, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def write_qwen3(folder: Path) -> None:
    Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"],
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        vocab_size=2048,
    ).save_pretrained(folder)


def test_hugging_face_model_balances(ranks, tmp_path):
    write_qwen3(tmp_path)
    own = ranks.run(1, transformers_trainer, False, str(tmp_path))
    check(own, ranks.run(1, transformers_trainer, True, str(tmp_path)))


def test_hugging_face_model_with_frozen_parts(ranks, tmp_path):
    write_qwen3(tmp_path)
    (found,) = ranks.run(1, frozen_transformers_trainer, str(tmp_path))
    assert found == [("sigmoid", False, False, True), ("sigmoid", True, True, False)]


def test_dense_hugging_face_model_is_refused():
    backend = importlib.import_module("torchtitan.experiments.transformers_modeling_backend")
    spec = backend.model_registry("debugmodel")
    with pytest.raises(JobError, match="no MoE layer.*titan_moe_lb.balanced_transformers"):
        balanced(spec)
    model = nn.Module()
    model.layers = nn.ModuleDict({"0": nn.Identity()})
    model.config = SimpleNamespace(architectures=["Qwen3ForCausalLM"])
    with pytest.raises(JobError, match="finds no MoE layer in Qwen3ForCausalLM: choose a MoE"):
        balanced_transformers(spec).parallelize_fn(
            model,
            compile_config=SimpleNamespace(enable=False),
            ac_config=None,
            parallel_dims=SimpleNamespace(pp_enabled=False),
        )


def test_forge_asks_for_a_loss_that_no_spec_has(ranks):
    """No model runs there without a change. If this fails, update
    docs/evidence/other_trainers.md."""
    (said,) = ranks.run(1, forge_engine_as_it_is)
    assert said == "'ModelSpec' object has no attribute 'loss'"
