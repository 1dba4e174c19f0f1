"""What torch 2.14 needs to pass any tensor between two stages of a pipeline.

Upstream fact: a stage receives into a buffer with the strides that its metadata has for what the
other sends (``torch/distributed/pipelining/_utils.py``, ``_make_tensor_from_meta``). gloo refuses
one that is not contiguous, and NCCL copies it as it lies in memory (pytorch/pytorch#114982). With
tensor and sequence parallelism and more than one sequence a micro-batch, a stage of torchtitan
0.3.0 ends in such a one: what is scattered along the sequence comes back transposed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only


def make_contiguous(stage: nn.Module) -> None:
    """Let the output of a stage and the gradient of its input be contiguous; else each is a copy."""
    stage.register_forward_pre_hook(_with_contiguous_gradient)
    stage.register_forward_hook(_contiguous_output)


def _with_contiguous_gradient(_stage: nn.Module, inputs: tuple) -> tuple:
    return tree_map_only(torch.Tensor, _hooked, inputs)


def _hooked(received: torch.Tensor) -> torch.Tensor:
    """A view with a hook: the buffer stays, and would keep the hooks of every step
    (pytorch/pytorch#185331)."""
    if not received.requires_grad:
        return received
    view = received.view_as(received)
    view.register_hook(torch.Tensor.contiguous)
    return view


def _contiguous_output(_stage: nn.Module, _inputs: tuple, output: Any) -> Any:
    return tree_map_only(torch.Tensor, torch.Tensor.contiguous, output)
