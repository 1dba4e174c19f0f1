"""What torch 2.14 needs to pass any tensor between two stages of a pipeline.

Upstream fact: a stage receives into a buffer with the strides of what the other sends
(``torch/distributed/pipelining/_utils.py``, ``_make_tensor_from_meta``), and gloo and NCCL
send and receive contiguous tensors alone. With tensor and sequence parallelism and more than
one sequence a micro-batch, a stage of torchtitan 0.3.0 ends in one that is not: what is
scattered along the sequence comes back transposed. The job then ends in "input tensor has to be
contiguous".
"""

from __future__ import annotations

import torch
from torch import nn


def make_contiguous(stage: nn.Module) -> None:
    """Let the output of a stage, and the gradient of its input, be contiguous: a copy at most."""
    stage.register_forward_pre_hook(_hook_gradients)
    stage.register_forward_hook(_contiguous_output)


def _hook_gradients(_stage: nn.Module, inputs: tuple) -> None:
    for tensor in inputs:
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            tensor.register_hook(torch.Tensor.contiguous)


def _contiguous_output(_stage: nn.Module, _inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    return output.contiguous()
