"""Tests of recomputation: a repeated forward reuses the routing decisions of the first one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchtitan.config.override import derive
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC

from tests.support.routers import (
    BOUND,
    DIM,
    EXPERTS,
    GROUPS,
    LENGTH,
    ROWS,
    TOP_K,
    router,
    sequence_wise,
    wired,
)
from titan_moe_lb.balancing.checkpointing import FullACSavingDecisions, SelectiveACSavingDecisions
from titan_moe_lb.balancing.forced_routing import BiasedNormal
from titan_moe_lb.balancing.losses import GlobalBatchAuxLoss
from titan_moe_lb.balancing.router import LoadBalancedRouter


@torch.library.custom_op("titan_moe_lb_tests::disturb", mutates_args=())
def disturb(logits: torch.Tensor) -> torch.Tensor:
    """Change the logits in every forward that the autograd engine repeats."""
    again = torch._C._current_graph_task_id() != -1
    return logits.flip(-1) if again else logits.clone()


disturb.register_fake(torch.empty_like)
disturb.register_autograd(lambda ctx, grad: grad)


class Gate(nn.Module):
    """Gate with different logits in a repeated forward, or with ties between all experts."""

    def __init__(self, linear: nn.Module, *, disturbed: bool) -> None:
        super().__init__()
        self.linear, self.disturbed = linear, disturbed
        self.weight = linear.weight
        if not disturbed:
            with torch.no_grad():
                self.weight.copy_(self.weight[:1].expand_as(self.weight))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.linear(x)
        return disturb(logits) if self.disturbed else logits


class Block(nn.Module):
    """Router whose experts each have a number in the loss, so its gradient counts their uses."""

    def __init__(self, *, disturbed: bool) -> None:
        super().__init__()
        self.router = router([sequence_wise("scores")], **GROUPS)
        self.router.gate = Gate(self.router.gate, disturbed=disturbed)
        self.numbers = nn.Parameter(torch.ones(EXPERTS))
        self.mix = nn.Linear(DIM, DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores, ids, _full = self.router(self.mix(x))
        return self.numbers.square()[ids].sum() + scores.square().sum()


def no_checkpointing(block: nn.Module) -> nn.Module:
    return block


def upstream(block: nn.Module) -> nn.Module:
    return FullAC.Config().build()._wrap_block(block)


def full(block: nn.Module) -> nn.Module:
    return FullACSavingDecisions.Config().build()._wrap_block(block)


def full_compiled(block: nn.Module) -> nn.Module:
    wrapped = FullACSavingDecisions.Config(compiled=True).build()._wrap_block(block)
    return torch.compile(wrapped, fullgraph=True, backend="aot_eager")


def selective(block: nn.Module) -> nn.Module:
    config = SelectiveACSavingDecisions.Config(force_recompute_mm_shapes_by_fqns=[])
    return config.build()._wrap_block(block)


def selective_compiled(block: nn.Module) -> nn.Module:
    return torch.compile(selective(block), fullgraph=True, backend="aot_eager")


def used_by_backward(how, *, disturbed: bool, twice: bool = False) -> tuple[list, list, list]:
    """Tokens of each expert: chosen in the forward, used in the backward, and recorded."""
    torch.manual_seed(0)
    block = Block(disturbed=disturbed)
    x = torch.randn(ROWS, LENGTH, DIM)
    with torch.no_grad():
        _scores, ids, _full = block.eval().router(block.mix(x))
    chosen = torch.bincount(ids.flatten(), minlength=EXPERTS).tolist()
    out = how(block.train())(x)
    if twice:
        torch.autograd.grad(out, [block.mix.weight], retain_graph=True, allow_unused=True)
    out.backward()
    used = (block.numbers.grad / 2).tolist()
    return chosen, used, block.router.record.counts_MSE[0, 0].tolist()


@pytest.mark.parametrize("disturbed", [True, False], ids=["disturbed", "ties"])
@pytest.mark.parametrize(
    "how", [no_checkpointing, full, full_compiled, selective, selective_compiled]
)
def test_backward_uses_the_experts_of_the_forward(how, disturbed):
    torch._dynamo.reset()
    chosen, used, recorded = used_by_backward(how, disturbed=disturbed)
    assert sum(chosen) == ROWS * LENGTH * TOP_K
    assert used == chosen
    assert recorded == chosen


@pytest.mark.parametrize("how", [full, selective])
def test_a_checkpointed_block_can_be_copied(how):
    """Preference optimization, for example, copies the model as its reference."""
    copied = copy.deepcopy(how(Block(disturbed=False))).eval()
    assert torch.isfinite(copied(torch.randn(ROWS, LENGTH, DIM)))


def test_a_second_pass_of_backward_uses_them_too():
    """A zero-bubble schedule repeats the forward for the inputs, and again for the weights."""
    chosen, used, recorded = used_by_backward(full, disturbed=True, twice=True)
    assert used == chosen and recorded == chosen


def test_torchtitans_own_policy_uses_others():
    """The test can fail: without saved decisions, the repeated forward uses other experts."""
    chosen, used, _recorded = used_by_backward(upstream, disturbed=True)
    assert used != chosen


FORCED = BiasedNormal.Config(std=1.0, num_experts=EXPERTS, top_k=TOP_K)
RUNNING = GlobalBatchAuxLoss.Config(weight=0.5, counts="running", **BOUND)


@pytest.mark.parametrize("how", [full, full_compiled, selective, selective_compiled])
@pytest.mark.parametrize(
    "options",
    [{}, {"forced_routing": FORCED}, {"aux_losses": [RUNNING]}],
    ids=["loss of scores", "forced routing", "running counts"],
)
def test_gradient_is_that_without_checkpointing(how, options):
    """Two forwards are followed by their backwards.

    When the first forward repeats, the strategy's clock and the loss's counts have already
    advanced.
    """
    gradients = []
    for wrap in (no_checkpointing, how):
        torch._dynamo.reset()
        torch.manual_seed(0)
        block = Block(disturbed=False)
        config = derive(block.router.config, LoadBalancedRouter.Config, **options)
        block.router = config.build()
        nn.init.normal_(block.router.gate.weight, generator=torch.Generator().manual_seed(1))
        wired(block.router)
        forward = wrap(block)
        for output in [forward(torch.randn(ROWS, LENGTH, DIM)) for _ in range(2)]:
            output.backward()
        gradients.append((block.numbers.grad, block.router.gate.weight.grad, block.mix.weight.grad))
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 if options else 1e-7)
    assert gradients[0][1].abs().max() > 0


def test_types_of_torchtitan_are_those_that_are_replaced():
    """With another class hierarchy in torchtitan, they would silently not be replaced."""
    assert issubclass(FullACSavingDecisions, FullAC)
    assert issubclass(SelectiveACSavingDecisions, SelectiveAC)
