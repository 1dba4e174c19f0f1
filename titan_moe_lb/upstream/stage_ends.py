"""Contiguous tensors between the stages of a pipeline.

Upstream fact: a stage receives into a buffer with the strides of the tensor that is sent
(``torch/distributed/pipelining/_utils.py``, ``_make_tensor_from_meta``). gloo refuses a buffer that
is not contiguous, and NCCL ignores its strides (pytorch/pytorch#114982). A stage of torchtitan
0.3.0 outputs such a tensor under tensor and sequence parallelism, if a micro-batch has several
sequences.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils._pytree import tree_map_only


def make_contiguous(stage: nn.Module) -> None:
    """Make the output of a stage and the gradient of its input contiguous."""
    stage.register_forward_pre_hook(
        lambda _stage, inputs: tree_map_only(torch.Tensor, _hooked, inputs)
    )
    stage.register_forward_hook(
        lambda _stage, _inputs, output: tree_map_only(torch.Tensor, torch.Tensor.contiguous, output)
    )


def _hooked(received: torch.Tensor) -> torch.Tensor:
    """Return a view with a hook.

    The buffer itself would collect the hooks of all steps (pytorch/pytorch#185331).
    """
    if not received.requires_grad:
        return received
    view = received.view_as(received)
    view.register_hook(torch.Tensor.contiguous)
    return view
