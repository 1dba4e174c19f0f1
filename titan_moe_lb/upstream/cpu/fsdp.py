"""FSDP on gloo.

Upstream fact: torchtitan sets FSDP's gradient divide factor to 1, which torch implements with a
pre-multiplied sum (``PREMUL_SUM``). gloo has no such reduction. A setting of FSDP makes it use a
plain sum.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import nn
from torch.distributed.fsdp import FSDPModule


def with_sum_reduction(parallelize: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Wrap a ``ModelSpec.parallelize_fn`` so that FSDP reduces gradients by a plain sum."""

    @functools.wraps(parallelize)
    def parallelize_on_host(model: nn.Module, **kwargs: object) -> nn.Module:
        model = parallelize(model, **kwargs)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
        return model

    return parallelize_on_host
