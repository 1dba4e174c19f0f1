"""Every loss of the router against autograd on the formula of its paper, sequence by sequence."""

from __future__ import annotations

import pytest
import torch
from torchtitan.config.override import derive
from torchtitan.models.common.config_utils import make_router_config

from titan_moe_lb.balancing.losses import (
    BatchWiseAuxLoss,
    CommunicationLoss,
    DeviceLevelLoss,
    EntropyLoss,
    GlobalBatchAuxLoss,
    ImportanceLoss,
    RouterZLoss,
    SequenceWiseAuxLoss,
    SumsLoss,
)
from titan_moe_lb.balancing.recording.training_loop import TrainingLoop
from titan_moe_lb.balancing.router import LoadBalancedRouter
from titan_moe_lb.balancing.step_hook import wire
from titan_moe_lb.balancing.valid_tokens.batch_tokens import (
    batch_tokens,
    before_padding,
    document_numbers,
)
from titan_moe_lb.errors import JobError
from titan_moe_lb.parallel.rank_groups import RankGroups

DIM, EXPERTS, TOP_K, ROWS, LENGTH, GROUPS = 16, 8, 3, 3, 20, 4
WEIGHT = 0.3
LOSSES = {
    "sequence_wise": SequenceWiseAuxLoss.Config(weight=WEIGHT),
    "scores": SequenceWiseAuxLoss.Config(weight=WEIGHT, count_from="scores"),
    "batch_wise": BatchWiseAuxLoss.Config(weight=WEIGHT),
    "device_level": DeviceLevelLoss.Config(weight=WEIGHT, num_device_groups=GROUPS),
    "communication": CommunicationLoss.Config(
        weight=WEIGHT, num_device_groups=GROUPS, devices_per_token=2
    ),
    "importance": ImportanceLoss.Config(weight=WEIGHT),
    "entropy": EntropyLoss.Config(weight=WEIGHT),
    "z_loss": RouterZLoss.Config(weight=WEIGHT),
}
VALID = torch.arange(LENGTH) < torch.tensor([[LENGTH], [11], [4]])
DOCUMENTS = document_numbers(
    torch.cat([torch.arange(7), torch.arange(3), torch.arange(10)]).repeat(ROWS, 1)
)


def built(loss, score_func: str, padded: bool) -> LoadBalancedRouter:
    loss.num_experts, loss.top_k = EXPERTS, TOP_K
    config = derive(
        make_router_config(
            dim=DIM,
            num_experts=EXPERTS,
            gate_param_init={},
            top_k=TOP_K,
            score_func=score_func,
            route_norm=False,
        ),
        LoadBalancedRouter.Config,
        aux_losses=[loss],
        loop=TrainingLoop(padded=padded),
    )
    router = config.build()
    torch.nn.init.normal_(router.gate.weight, generator=torch.Generator().manual_seed(3))
    wire([router], RankGroups()).weights_A.fill_(WEIGHT / ROWS)
    return router


def told(valid: torch.Tensor, documents: torch.Tensor | None):
    return batch_tokens(valid, documents, max_documents=3, slices=[(0, LENGTH)])


def textbook(name: str, logits, scores, ids) -> torch.Tensor:
    """The loss of one sequence of tokens, ``(T, E)`` and ``(T, K)``, nothing masked."""
    share = scores / scores.sum(dim=-1, keepdim=True)
    P = share.mean(dim=0)
    if name == "z_loss":
        return logits.exp().sum(dim=-1).log().square().mean()
    if name == "importance":
        return P.var(correction=0) / P.mean() ** 2
    if name == "entropy":
        return torch.log(torch.tensor(float(EXPERTS))) + (P * P.log()).sum()
    if name == "scores":
        ids = scores.topk(TOP_K, dim=-1).indices
    selected = torch.zeros_like(scores).scatter(-1, ids, 1.0)
    f = selected.sum(dim=0) * EXPERTS / (TOP_K * len(scores))
    if name == "device_level":
        return (f.view(GROUPS, -1).mean(dim=1) * P.view(GROUPS, -1).sum(dim=1)).sum()
    if name == "communication":
        sent = selected.view(len(scores), GROUPS, -1).amax(dim=-1).sum(dim=0)
        return (GROUPS / (2 * len(scores)) * sent * P.view(GROUPS, -1).sum(dim=1)).sum()
    return (f * P).sum()


def check(router: LoadBalancedRouter, expected) -> None:
    """Raw value and gradient in the input and the gate: ours against autograd on ``expected``."""
    x = torch.randn(ROWS, LENGTH, DIM, generator=torch.Generator().manual_seed(5))
    x.requires_grad_()
    router(x)[0].sum().mul(0).backward()
    ours = [x.grad, router.gate.weight.grad]
    x.grad = router.gate.weight.grad = None
    logits = router.gate(x)
    scores = logits.softmax(-1) if router.score_func == "softmax" else logits.sigmoid()
    loss = expected(logits, scores, scores.topk(TOP_K, dim=-1).indices)
    (WEIGHT * loss).backward()
    mean = router.record.losses_A.item() / ROWS
    assert mean == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
    for gradient, reference in zip(ours, [x.grad, router.gate.weight.grad], strict=True):
        error = (gradient - reference).abs().max() / reference.abs().max()
        assert error <= 1e-5


@pytest.mark.parametrize("score_func", ["sigmoid", "softmax"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", LOSSES)
def test_gradient_is_that_of_the_textbook(name, padded, score_func):
    router = built(LOSSES[name], score_func, padded)
    valid = VALID if padded else torch.ones(ROWS, LENGTH, dtype=torch.bool)
    if padded:
        router.tokens = told(VALID, None)

    def expected(logits, scores, ids):
        tables = (logits, scores, ids)
        if name == "batch_wise":
            return textbook(name, *(table[valid] for table in tables))
        rows = [textbook(name, *(t[row, valid[row]] for t in tables)) for row in range(ROWS)]
        return sum(rows) / ROWS

    check(router, expected)


@pytest.mark.parametrize("score_func", ["sigmoid", "softmax"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_documents_are_sequences_that_weigh_as_many_tokens_as_they_have(padded, score_func):
    loss = SequenceWiseAuxLoss.Config(weight=WEIGHT, over="document", max_documents=3)
    router = built(loss, score_func, padded)
    valid = VALID if padded else torch.ones(ROWS, LENGTH, dtype=torch.bool)
    router.tokens = told(valid, DOCUMENTS)

    def expected(logits, scores, ids):
        total = 0
        for row in range(ROWS):
            for document in range(3):
                tokens = valid[row] & (DOCUMENTS[row] == document)
                if tokens.any():
                    parts = (table[row, tokens] for table in (logits, scores, ids))
                    weight = tokens.sum() / valid[row].sum() / ROWS
                    total = total + weight * textbook("sequence_wise", *parts)
        return total

    check(router, expected)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "z_loss"])
def test_closed_form_is_the_gradient_of_the_value(name):
    loss: SumsLoss = built(LOSSES[name], "sigmoid", True).aux_losses[LOSSES[name]._owner.type_name]
    tokens = told(VALID, None)
    generator = torch.Generator().manual_seed(1)
    sums = torch.rand(ROWS, EXPERTS, generator=generator)
    sums *= tokens.rows.tokens / sums.sum(dim=-1, keepdim=True)
    counts = torch.randint(0, 9, (ROWS, EXPERTS), generator=generator)
    found = loss.coefficients(sums, counts, tokens.rows).expand_as(sums)
    reference = SumsLoss.coefficients(loss, sums, counts, tokens.rows)
    torch.testing.assert_close(found, reference, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_without_a_valid_token_teaches_nothing(name):
    router = built(LOSSES[name], "sigmoid", True)
    router.tokens = told(torch.zeros(ROWS, LENGTH, dtype=torch.bool), None)
    x = torch.randn(ROWS, LENGTH, DIM, requires_grad=True)
    router(x)[0].sum().mul(0).backward()
    assert router.record.losses_A.item() == 0
    assert not router.gate.weight.grad.any() and not x.grad.any()
    dispatched, valid = router.record.counts_MSE[0, :2]
    assert dispatched.sum() == ROWS * LENGTH * TOP_K and not valid.any()


def test_a_row_without_a_valid_token_adds_nothing_to_the_others():
    """The row counts among the rows of the mean, and has no loss."""
    valid = VALID.clone()
    valid[2] = False
    router = built(LOSSES["entropy"], "sigmoid", True)
    router.tokens = told(valid, None)

    def expected(logits, scores, ids):
        rows = [
            textbook("entropy", *(t[row, valid[row]] for t in (logits, scores, ids)))
            for row in range(2)
        ]
        return sum(rows) / ROWS

    check(router, expected)


def test_documents_beyond_the_last_that_is_told_apart_join_it():
    numbers = document_numbers(torch.tensor([[0, 0, 1, 0, 1, 2, 0, 0]]))
    assert numbers.tolist() == [[0, 1, 1, 2, 2, 2, 3, 4]]
    tokens = batch_tokens(
        torch.ones(1, 8, dtype=torch.bool),
        numbers,
        max_documents=3,
        slices=[(0, 2), (6, 2)],
    )
    assert tokens.document_BL.tolist() == [[0, 1, 2, 2]]
    assert tokens.documents.tokens.flatten().tolist() == [1, 2, 5]
    assert tokens.documents.share.flatten().tolist() == [1 / 8, 2 / 8, 5 / 8]


def test_padding_is_the_run_of_ignored_labels_at_the_end():
    """Ignored labels of a prompt, in front or between, are no padding."""
    labels = torch.tensor([[-1, -1, 3, 4, -1, 5, -1, -1], [1, 2, 3, 4, 5, 6, 7, 8]])
    found = before_padding(labels, -1)
    assert found.int().tolist() == [[1, 1, 1, 1, 1, 1, 0, 0], [1] * 8]


def test_groups_that_do_not_divide_the_experts_are_one_line():
    loss = DeviceLevelLoss.Config(weight=0.1, num_device_groups=3)
    with pytest.raises(JobError, match="num_device_groups 3, which must divide the 8 experts"):
        DeviceLevelLoss.Config.check_groups(loss, 8)


def test_previous_step_without_a_valid_token_keeps_its_load():
    loss = GlobalBatchAuxLoss.Config(weight=0.1, num_experts=4, top_k=1)
    built_loss = loss.build()
    GlobalBatchAuxLoss.finish_step([built_loss], torch.tensor([[4, 0, 0, 0]]))
    GlobalBatchAuxLoss.finish_step([built_loss], torch.zeros(1, 4, dtype=torch.int64))
    assert built_loss.load_E.tolist() == [4, 0, 0, 0]
