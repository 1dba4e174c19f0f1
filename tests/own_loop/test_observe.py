"""Tests of ``observe``: counts equal those of plain numpy, and nothing of the model changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

import titan_moe_lb as lb
from tests.support.observed_models import MODELS, E, K, Logits, batch, model_of
from titan_moe_lb import cli


def learn(model: nn.Module, ids: torch.Tensor) -> None:
    model(input_ids=ids, labels=ids).loss.backward()


@pytest.mark.parametrize("name", MODELS)
def test_counts_are_those_of_numpy(name, tmp_path):
    """Over two accumulated forwards; an evaluation between them is not counted."""
    model = model_of(name)
    observed = lb.observe(model, tmp_path)
    logits = Logits(model)
    learn(model, batch(1))
    before = [logits.by_router.copy() for _ in [0]]
    rows = {router: list(found) for router, found in before[0].items()}
    with torch.no_grad():
        model.eval()(input_ids=batch(2))
    model.train()
    logits.by_router.update(rows)
    learn(model, batch(3))
    metrics = observed.step(7, loss=1.5)
    observed.close()
    found = lb.read_trace(tmp_path)
    expected_ME = logits.counts(grouped=name == "deepseek_v3")
    np.testing.assert_array_equal(found.counts_SME, expected_ME[None])
    assert found.steps.tolist() == [7] and found.over_steps("loss").tolist() == [1.5]
    assert (found.info.top_k, found.info.num_experts) == (K, E)
    assert found.info.global_batch_size == 2  # micro-batches
    expected = (expected_ME.max(axis=1) / expected_ME.mean(axis=1) - 1).mean()
    assert metrics["moe/max_violation"] == pytest.approx(expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["qwen3_moe", "llama4"])
def test_a_repeated_forward_is_counted_once(name, reentrant):
    model = model_of(name)
    plain = lb.observe(model)
    learn(model, batch(1))
    metrics = plain.step(1)
    plain.close()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    observed, calls = lb.observe(model), []
    router = next(module for module in model.modules() if hasattr(module, "top_k"))
    router.register_forward_pre_hook(lambda *_: calls.append(1))
    learn(model, batch(1))
    assert len(calls) == 2  # it did repeat
    assert observed.step(1) == metrics


def test_nothing_of_the_model_changes():
    model, plain = model_of("qwen3_moe"), model_of("qwen3_moe")
    observed = lb.observe(model)
    for one in (model, plain):
        learn(one, batch(1))
    assert model.state_dict().keys() == plain.state_dict().keys()
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad)
    observed.close()
    learn(model, batch(1))
    assert observed.step(1) != {} and observed.step(2) == {}  # what came before close()


def observe_on_ranks(wrapped: str, folder: str) -> dict[str, float]:
    """Observe rank r on batch r, twice."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    model = model_of("qwen3_moe")
    if wrapped == "DDP":
        model = DistributedDataParallel(model)
    else:
        fully_shard(model)
    observed = lb.observe(model, folder, ep=2)
    for seed in (0, 2):
        learn(model, batch(seed + dist.get_rank()))
    metrics = observed.step(1)
    observed.close()
    return metrics


@pytest.mark.parametrize("wrapped", ["DDP", "FSDP"])
def test_ranks_are_summed(ranks, wrapped, tmp_path):
    by_rank = ranks.run(2, observe_on_ranks, wrapped, str(tmp_path))
    model = model_of("qwen3_moe")
    alone = lb.observe(model)
    for seed in range(4):
        learn(model, batch(seed))
    assert by_rank == [alone.step(1)] * 2
    found = lb.read_trace(tmp_path)
    assert (found.info.ep, found.info.global_batch_size) == (2, 4)


def test_a_trainer_of_transformers_records_every_step(tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in batch(0, rows=16)]
    arguments = TrainingArguments(
        str(tmp_path / "trainer"),
        max_steps=12,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        report_to=[],
        use_cpu=True,
    )
    run = tmp_path / "run"
    Trainer(
        model_of("olmoe"), arguments, train_dataset=rows, callbacks=[lb.ExpertLoadCallback(run)]
    ).train()
    found = lb.read_trace(run)
    assert found.steps.tolist() == [*range(1, 13)] and found.ended
    assert (found.counts_SME.sum(axis=-1) == K * 4 * 16).all()
    for command in (["report", str(run)], ["diagnose", str(run)]):
        cli.main(command)


class OwnRouter(nn.Module):
    """Router of a user, which returns logits."""

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return x_TD[:, :4]


class OwnModel(nn.Module):
    """Model of a user, whose layers differ in their names from those of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"chooser": OwnRouter()}) for _ in range(2)])

    def forward(self, x_TD: torch.Tensor) -> None:
        for block in self.blocks:
            block["chooser"](x_TD)


def test_any_module_by_a_pattern_and_a_function(tmp_path):
    model = OwnModel()
    observed = lb.observe(
        model,
        tmp_path,
        routers="blocks.*.chooser",
        num_experts=4,
        expert_ids=lambda _router, output: output.argmax(dim=-1, keepdim=True),
    )
    model(torch.eye(4, 6)[[0, 0, 3]])
    observed.step(1)
    assert lb.read_trace(tmp_path).counts_SME.tolist() == [[[2, 0, 0, 1]] * 2]


def balanced_model() -> nn.Module:
    from torchtitan.config import TrainingConfig

    from model_registry.deepseek_v3 import model_registry

    return lb.build_model(model_registry("tiny"), training=TrainingConfig(seq_len=64), seed=0)[0]


@pytest.mark.parametrize(
    ("make", "options", "named"),
    [
        (OwnModel, {}, "routers"),
        (OwnModel, {"routers": "*.gate"}, r"\*\.gate"),
        (OwnModel, {"routers": "*.chooser"}, "num_experts"),
        (balanced_model, {}, "attach"),
    ],
)
def test_what_cannot_be_observed_is_refused(make, options, named):
    with pytest.raises(lb.JobError, match=named):
        lb.observe(make(), **options)


def test_logits_instead_of_ids_are_refused():
    model = OwnModel()
    options = {"routers": "*.chooser", "num_experts": 4}
    lb.observe(model, expert_ids=lambda _router, output: output, **options)
    with pytest.raises(lb.JobError, match="expert_ids"):
        model(torch.eye(4, 6))


def test_a_mask_instead_of_ids_is_refused():
    """Megatron's routers return probabilities and a boolean map."""
    model = OwnModel()
    options = {"routers": "*.chooser", "num_experts": 4}
    lb.observe(model, expert_ids=lambda _router, output: output > 0, **options)
    with pytest.raises(lb.JobError, match="expert_ids"):
        model(torch.eye(4, 6))


def test_a_model_that_was_compiled_before_is_refused_at_its_first_step():
    """Its graphs do not run hooks that come after them."""
    model = OwnModel()
    model.compile(backend="eager")
    model(torch.eye(4, 6))
    options = {"routers": "*.chooser", "num_experts": 4}
    observed = lb.observe(model, expert_ids=lambda _, x: x.argmax(dim=-1, keepdim=True), **options)
    model(torch.eye(4, 6))
    with pytest.raises(lb.JobError, match="compiled"):
        observed.step(1)


def test_a_model_that_is_compiled_after_it_is_counted():
    model = OwnModel()
    options = {"routers": "*.chooser", "num_experts": 4}
    observed = lb.observe(model, expert_ids=lambda _, x: x.argmax(dim=-1, keepdim=True), **options)
    model.compile(backend="eager")
    for _ in range(3):
        model(torch.eye(4, 6)[[0, 0, 3]])
    assert observed.step(1)["moe/max_violation"] == pytest.approx(6 / (9 / 4) - 1)


def test_steps_ascend_and_numbers_stay():
    model = model_of("qwen3_moe")
    observed = lb.observe(model)
    learn(model, batch(1))
    observed.step(3, loss=1.0)
    for step, numbers in ((3, {"loss": 1.0}), (4, {"lr": 0.1})):
        with pytest.raises(lb.JobError, match=f"step {step}"):
            observed.step(step, **numbers)


def observe_stages() -> str:
    """Observe another layer on each rank."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    model = model_of("qwen3_moe")
    if dist.get_rank():
        del model.model.layers[0]
    with pytest.raises(lb.JobError) as error:
        lb.observe(model).step(1)
    return str(error.value)


def test_stages_of_a_pipeline_are_refused_on_every_rank(ranks):
    assert all("pipeline" in message for message in ranks.run(2, observe_stages))
