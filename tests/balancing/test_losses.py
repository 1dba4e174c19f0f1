"""Tests of the gradient of every loss in a router, against autograd on its formula.

The formulas are in tests/support/textbook.py. The reference is torchtitan's own router with the
loss added to its output.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from tests.support.routers import (
    DOCUMENTS,
    EXPERTS,
    GROUPS,
    LENGTH,
    PADDED,
    ROWS,
    TOP_K,
    WHOLE,
    inputs,
    router,
    upstream_router,
    values,
    with_mask,
)
from tests.support.textbook import (
    GROUPS_PER_TOKEN,
    NUM_GROUPS,
    SCORES,
    mean_loss,
    sequence_loss,
)
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
from titan_moe_lb.balancing.valid_tokens.batch_tokens import (
    batch_tokens,
    before_padding,
    document_numbers,
)
from titan_moe_lb.errors import JobError

# The gradients of a loss are larger than those of the output, so that the bounds are those of a loss.
WEIGHT, OUTPUT = 30.0, 0.02
LOSSES = {
    "sequence_wise": SequenceWiseAuxLoss.Config(weight=WEIGHT),
    "sequence_wise of scores": SequenceWiseAuxLoss.Config(weight=WEIGHT, count_from="scores"),
    "batch_wise": BatchWiseAuxLoss.Config(weight=WEIGHT),
    "batch_wise of scores": BatchWiseAuxLoss.Config(weight=WEIGHT, count_from="scores"),
    "global_batch": GlobalBatchAuxLoss.Config(weight=WEIGHT),
    "device_level": DeviceLevelLoss.Config(weight=WEIGHT, num_device_groups=NUM_GROUPS),
    "communication": CommunicationLoss.Config(
        weight=WEIGHT, num_device_groups=NUM_GROUPS, devices_per_token=GROUPS_PER_TOKEN
    ),
    "importance": ImportanceLoss.Config(weight=WEIGHT),
    "entropy": EntropyLoss.Config(weight=WEIGHT),
    "z_loss": RouterZLoss.Config(weight=WEIGHT / 10),
}
OPTIONS = {"plain": {}, "groups": {**GROUPS, "route_norm": True, "route_scale": 2.5}}
PREVIOUS_E = torch.arange(1, EXPERTS + 1)
"""Tokens of each expert in the previous step, for the global-batch loss."""


def built(losses, score_func="sigmoid", *, valid=None, documents=None, **options):
    """Build a router in float64, or in float32 if batches have a token mask."""
    built = router(
        losses,
        score_func,
        loop=TrainingLoop(padded=valid is not None),
        dtype=torch.float64 if valid is None and documents is None else torch.float32,
        **options,
    )
    if valid is not None or documents is not None:
        with_mask(built, WHOLE if valid is None else valid, documents)
    return built


def reference(name, valid, logits, scores, ids):
    """Raw value of a loss: mean over the rows, over their valid tokens only."""
    kind, _, of_scores = name.partition(" ")
    counted = scores.topk(TOP_K, dim=-1).indices if of_scores else ids
    tables = (logits, scores, counted)
    if kind == "batch_wise":
        return sequence_loss("sequence_wise", *(table[valid] for table in tables))
    counts_E = PREVIOUS_E if kind == "global_batch" else None
    rows = [
        sequence_loss(kind, *(table[row, valid[row]] for table in tables), counts_E)
        for row in range(ROWS)
        if valid[row].any()
    ]
    return sum(rows) / ROWS


def check(built, references, **options):
    """Compare values, and gradients of ``output + sum of weight * loss`` in the input and the
    gate."""
    dtype = built.gate.weight.dtype
    bound = 1e-6 if dtype == torch.float64 else 1e-5  # weights and coefficients are float32
    for loss in built.aux_losses.values():
        if loss.needs_step_counts:
            loss.finish_step([loss], PREVIOUS_E[None])
    x, bias = inputs(dtype)
    (OUTPUT * built(x, bias)[0].square().sum()).backward()

    upstream = upstream_router(built.score_func, **options).to(dtype)
    y, _ = inputs(dtype)
    chosen, ids, scores = upstream(y, bias)
    logits = upstream.gate(y)
    losses = [of(logits, scores, ids) for of in references]
    weights = [loss.config.weight for loss in built.aux_losses.values()]
    aux = sum(weight * loss for weight, loss in zip(weights, losses, strict=True))
    (OUTPUT * chosen.square().sum() + aux).backward()
    assert values(built) == pytest.approx([loss.item() for loss in losses], rel=1e-5, abs=1e-6)
    pairs = ((x.grad, y.grad), (built.gate.weight.grad, upstream.gate.weight.grad))
    for ours, expected in pairs:
        assert (ours - expected).abs().max() <= bound * expected.abs().max()


@pytest.mark.parametrize("score_func", SCORES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("valid", [None, PADDED], ids=["whole", "padded"])
@pytest.mark.parametrize("name", LOSSES)
def test_gradient_is_that_of_output_plus_weighted_loss(name, valid, options, score_func):
    options = OPTIONS[options]
    router = built([LOSSES[name]], score_func, valid=valid, **options)
    tokens = WHOLE if valid is None else valid
    check(router, [lambda *tables: reference(name, tokens, *tables)], **options)


@pytest.mark.parametrize("score_func", SCORES)
def test_all_losses_together_are_their_sum(score_func):
    names = [name for name in LOSSES if name not in ("sequence_wise", "batch_wise")]
    router = built([LOSSES[name] for name in names], score_func, **GROUPS)
    references = [lambda *tables, name=name: reference(name, WHOLE, *tables) for name in names]
    check(router, references, **GROUPS)


@pytest.mark.parametrize("score_func", SCORES)
@pytest.mark.parametrize("valid", [None, PADDED], ids=["whole", "padded"])
def test_documents_are_sequences_that_weigh_as_many_tokens_as_they_have(valid, score_func):
    loss = SequenceWiseAuxLoss.Config(weight=WEIGHT, over="document", max_documents=3)
    router = built([loss], score_func, valid=valid, documents=DOCUMENTS)
    tokens = WHOLE if valid is None else valid

    def expected(logits, scores, ids):
        total = 0
        for row in range(ROWS):
            for document in range(3):
                of_it = tokens[row] & (DOCUMENTS[row] == document)
                if of_it.any():
                    share = of_it.sum() / tokens[row].sum() / ROWS
                    value = sequence_loss(
                        "sequence_wise", None, scores[row, of_it], ids[row, of_it]
                    )
                    total = total + share * value
        return total

    check(router, [expected])


class OwnLinearLoss(SumsLoss):
    """``sequence_wise`` without K: f is the share of an expert in all counts."""

    metric_name = "own_linear_loss"
    linear = True

    @dataclass(kw_only=True, slots=True)
    class Config(SumsLoss.Config):
        pass

    def coefficients(self, sums_BE, counts_BE, sequences):
        f_BE = self.num_experts * counts_BE / counts_BE.sum(dim=-1, keepdim=True)
        return f_BE * (sequences.share / sequences.tokens)


class OwnLoss(SumsLoss):
    """``sequence_wise`` without K and without the number of tokens."""

    metric_name = "own_loss"

    @dataclass(kw_only=True, slots=True)
    class Config(SumsLoss.Config):
        pass

    def value(self, sums_BE, counts_BE, sequences):
        f_BE = self.num_experts * counts_BE / counts_BE.sum(dim=-1, keepdim=True)
        P_BE = sums_BE / sums_BE.sum(dim=-1, keepdim=True)
        return (f_BE * P_BE * sequences.share).sum()


# Set after the class, so that ``kinds`` of the other tests does not have them.
OwnLinearLoss.type_name, OwnLoss.type_name = "own_linear", "own"


def _running_loss(valid, logits, scores, ids):
    """Compute the loss of the first forward of a step, with f of all its valid tokens."""
    counts_E = torch.bincount(ids[valid].flatten(), minlength=EXPERTS)
    tables = [(scores[row, valid[row]], ids[row, valid[row]]) for row in (0, 1)]
    return sum(sequence_loss("global_batch", None, *table, counts_E) for table in tables) / ROWS


WITH_AN_EMPTY_ROW = {
    "entropy": LOSSES["entropy"],
    "batch_wise": LOSSES["batch_wise"],
    "running": GlobalBatchAuxLoss.Config(weight=WEIGHT, counts="running"),
    "own": OwnLoss.Config(weight=WEIGHT),
    "own linear": OwnLinearLoss.Config(weight=WEIGHT),
}


@pytest.mark.parametrize("name", WITH_AN_EMPTY_ROW)
def test_a_row_without_a_valid_token_adds_nothing_to_the_others(name):
    """The mean counts the row, whose loss is 0. A formula may divide by its sums and counts."""
    valid = PADDED.clone()
    valid[2] = False
    router = built([WITH_AN_EMPTY_ROW[name]], valid=valid)

    def expected(*tables):
        if name == "running":
            return _running_loss(valid, *tables)
        kind = "sequence_wise" if name.startswith("own") else name
        return (2 / 3 if kind == "batch_wise" else 1) * reference(kind, valid, *tables)

    check(router, [expected])


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_without_a_valid_token_has_no_gradient(name):
    router = built([LOSSES[name]], valid=torch.zeros_like(WHOLE))
    x, bias = inputs()
    router(x, bias)[0].sum().mul(0).backward()
    assert values(router) == [0.0]
    assert not router.gate.weight.grad.any() and not x.grad.any()
    dispatched, valid = router.record.counts_MSE[0, :2]
    assert dispatched.sum() == ROWS * LENGTH * TOP_K and not valid.any()


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "z_loss"])
def test_closed_form_is_the_gradient_of_the_value(name):
    router = built([LOSSES[name]], valid=PADDED)
    (loss,) = router.aux_losses.values()
    generator = torch.Generator().manual_seed(1)
    sums = torch.rand(ROWS, EXPERTS, generator=generator)
    sums *= router.tokens.rows.tokens / sums.sum(dim=-1, keepdim=True)
    counts = torch.randint(0, 9, (ROWS, EXPERTS), generator=generator)
    found = loss.coefficients(sums, counts, router.tokens.rows).expand_as(sums)
    expected = SumsLoss.coefficients(loss, sums, counts, router.tokens.rows)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_global_batch_has_no_gradient_in_the_first_step():
    """Without counts of an earlier step, every f is 1 and the loss is sum_i P_i = 1."""
    router = built([GlobalBatchAuxLoss.Config(weight=1.0)], "softmax")
    x, bias = inputs(torch.float64)
    (0.0 * router(x, bias)[0].sum()).backward()
    assert x.grad.abs().max() < 1e-7
    assert values(router) == pytest.approx([1.0])


def test_previous_step_without_a_valid_token_keeps_its_load():
    loss = GlobalBatchAuxLoss.Config(weight=0.1, num_experts=4, top_k=1).build()
    GlobalBatchAuxLoss.finish_step([loss], torch.tensor([[4, 0, 0, 0]]))
    GlobalBatchAuxLoss.finish_step([loss], torch.zeros(1, 4, dtype=torch.int64))
    assert loss.load_E.tolist() == [4, 0, 0, 0]


@pytest.mark.parametrize("score_func", SCORES)
@pytest.mark.parametrize("kinds", [["sequence_wise", "z_loss"], ["z_loss"], []], ids=str)
def test_gradient_norms_are_those_of_the_output_and_of_the_losses(score_func, kinds):
    """The squared gradients in the logits sum over two forwards of one step.

    The gate gets the same gradient without the measurement.
    """
    losses = [LOSSES[kind] for kind in kinds]
    measuring = router(losses, score_func, loop=TrainingLoop(gradients_every=1))
    plain = router(losses, score_func)
    x, bias = inputs()
    for half in (slice(0, 2), slice(2, 3)):
        for one in (measuring, plain):
            one(x[half], bias)[0].square().sum().backward()
    measuring.step_record.finish_step(ROWS)

    upstream = upstream_router(score_func)
    hooked = []
    upstream.gate.register_forward_hook(lambda _gate, _inputs, logits: hooked.append(logits))
    chosen, ids, scores = upstream(x.detach(), bias)
    (logits,) = hooked
    aux = 0.0 * logits.sum()
    for loss, kind in zip(losses, kinds, strict=True):
        aux = aux + loss.weight * mean_loss(kind, logits, scores, ids)
    for total, found in zip(
        (chosen.square().sum(), aux), measuring.step_record.step_gradient_squares_N2[0], strict=True
    ):
        (gradient,) = torch.autograd.grad(total, logits, retain_graph=True)
        torch.testing.assert_close(found, gradient.square().sum(), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        measuring.gate.weight.grad, plain.gate.weight.grad, rtol=1e-5, atol=1e-6
    )


def test_documents_beyond_the_last_that_is_told_apart_join_it():
    numbers = document_numbers(torch.tensor([[0, 0, 1, 0, 1, 2, 0, 0]]))
    assert numbers.tolist() == [[0, 1, 1, 2, 2, 2, 3, 4]]
    tokens = batch_tokens(
        torch.ones(1, 8, dtype=torch.bool), numbers, max_documents=3, slices=[(0, 2), (6, 2)]
    )
    assert tokens.document_BL.tolist() == [[0, 1, 2, 2]]
    assert tokens.documents.tokens.flatten().tolist() == [1, 2, 5]
    assert tokens.documents.share.flatten().tolist() == [1 / 8, 2 / 8, 5 / 8]


def test_padding_is_the_run_of_ignored_labels_at_the_end():
    """Ignored labels of a prompt, at the start or in between, are not padding."""
    labels = torch.tensor([[-1, -1, 3, 4, -1, 5, -1, -1], [1, 2, 3, 4, 5, 6, 7, 8]])
    found = before_padding(labels, -1)
    assert found.int().tolist() == [[1, 1, 1, 1, 1, 1, 0, 0], [1] * 8]


def test_groups_that_do_not_divide_the_experts_are_refused():
    loss = DeviceLevelLoss.Config(weight=0.1, num_device_groups=3)
    with pytest.raises(JobError, match="num_device_groups"):
        loss.bind(num_experts=EXPERTS, top_k=TOP_K)


@dataclass(kw_only=True, slots=True)
class OwnBind(RouterZLoss.Config):
    def bind(self, *, num_experts: int, top_k: int) -> None:
        RouterZLoss.Config.bind(self, num_experts=num_experts, top_k=top_k)


def test_a_loss_with_its_own_bind_gets_the_rows_of_a_job():
    config = router([OwnBind(weight=0.1)]).config
    training = SimpleNamespace(local_batch_size=3)
    config.bind(SimpleNamespace(config=SimpleNamespace(training=training)))
    assert config.aux_losses[0].local_batch_size == 3


def test_an_evaluation_that_is_differentiated_is_not_measured():
    measuring = router([LOSSES["sequence_wise"]], loop=TrainingLoop(gradients_every=1)).eval()
    x, bias = inputs()
    measuring(x, bias)[0].square().sum().backward()
    measuring.step_record.finish_step(ROWS)
    assert not measuring.step_record.step_gradient_squares_N2.any()
