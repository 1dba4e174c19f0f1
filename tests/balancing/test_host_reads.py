"""Tests of ``RefuseHostReads``: it refuses every read of a number by the host, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.host_reads import RefuseHostReads

READS = {
    "item": lambda x: x.sum().item(),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "to by name": lambda x: x.to(device="cpu"),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "asarray": lambda x: np.asarray(x),
    "from_dlpack": lambda x: np.from_dlpack(x),
    "float": lambda x: float(x[0]),
    "int": lambda x: int(x[0]),
    "index": lambda x: range(x.long()[0]),
    "truth": lambda x: 1 if x[0] > 0 else 2,
    "equal": lambda x: torch.equal(x, x + 1),
    "allclose": lambda x: torch.allclose(x, x + 1),
    "isin a list": lambda x: x[0] in [1.0],
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "assignment by mask": lambda x: x.clone().index_put_((x > 0,), x[:1]),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "unique_consecutive": lambda x: x.unique_consecutive(),
    "bincount": lambda x: torch.bincount(x.long()),
    "repeat_interleave": lambda x: torch.repeat_interleave(x, x.long()),
}


@torch.library.custom_op("titan_moe_lb_tests::read", mutates_args=())
def read(x: torch.Tensor, how: str) -> torch.Tensor:
    READS[how](x)
    return x * 2


@torch.library.custom_op("titan_moe_lb_tests::count", mutates_args={"into"})
def count(into: torch.Tensor, ids: torch.Tensor) -> None:
    into.index_add_(0, ids, torch.ones_like(ids))


class ReadsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(context, x, how):
        context.how = how
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        return read(gradient, context.how), None


def refused():
    return pytest.raises(AssertionError, match="makes the host wait for the device")


@pytest.mark.parametrize("how", READS)
def test_a_read_is_refused(how):
    for call in (READS[how], lambda x: read(x, how)):
        with refused(), RefuseHostReads():
            call(torch.ones(3))
    READS[how](torch.ones(3))  # the refusal ends with its context


@pytest.mark.parametrize("how", ["tolist", "item", "nonzero", "cpu"])
def test_a_read_in_a_custom_operator_of_the_backward_is_refused(how):
    x = torch.ones(3, requires_grad=True)
    with refused(), RefuseHostReads():
        ReadsInBackward.apply(x, how).sum().backward()


def test_operators_of_the_device_pass_with_the_same_numbers():
    ids = torch.tensor([0, 2, 2])
    into = torch.zeros(3, dtype=torch.int64)
    weight = torch.ones(3, requires_grad=True)
    with RefuseHostReads():
        count(into, ids)
        selected = weight[ids].to(into.device) * torch.where(ids > 0, 2.0, 1.0)
        selected.sum().backward()
        repeated = torch.repeat_interleave(ids, torch.tensor([1, 0, 1]), output_size=2)
    assert into.tolist() == [1, 0, 2]
    assert weight.grad.tolist() == [1.0, 0.0, 4.0]
    assert repeated.tolist() == [0, 2]
