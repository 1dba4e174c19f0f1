"""Random weights on the host that depend on the seed, not on the layout.

Upstream fact: DTensor separates the random numbers of shards by the offset of a CUDA generator. A
CPU generator has no offset, so on a CPU mesh every rank draws the same numbers for its own shard.
Under EP 2, half of the experts are copies (https://github.com/pytorch/torchtitan/issues/4600).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor
from torchtitan.models.common.param_init import skip_param_init
from torchtitan.protocols.model import BaseModel
from torchtitan.protocols.module import Module

_DRAWS = (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default)
"""Operators of all draws in ``torch.nn.init``, ``trunc_normal_`` included. Dropout and random
tensors of a forward use others."""


def draw_whole_tensors() -> None:
    """Make each rank draw whole tensors and keep its own shard of each DTensor.

    The generators of the ranks must agree; torchtitan seeds all ranks of a pipeline stage equally.
    A rank has one whole tensor in memory at a time.
    """
    DTensor._op_dispatcher._custom_op_handlers.update(dict.fromkeys(_DRAWS, _draw))


def _draw(op_call: Any, args: tuple[object, ...], kwargs: dict[str, object]) -> DTensor:
    target = args[0]
    assert isinstance(target, DTensor)
    if not target.is_meta:
        whole = torch.empty(target.shape, dtype=target.dtype)
        op_call(whole, *args[1:], **kwargs)
        own = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
        target.to_local().copy_(own.to_local())
    return target


@contextmanager
def generator_of_rank_0() -> Iterator[None]:
    """Draw from a generator that rank 0 seeds; restore this rank's own generator afterwards."""
    seed = torch.randint(2**62, (1,))
    dist.broadcast(seed, src=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seed))
        yield


def with_draws_of_one_process(pipeline: Callable[..., tuple]) -> Callable[..., tuple]:
    """Wrap a ``ModelSpec.pipelining_fn`` so that stages start with the weights of one process.

    Upstream fact: the seed of a pipeline rank is the job's seed plus the rank's number.
    """

    @functools.wraps(pipeline)
    def pipeline_on_host(model: BaseModel, **arguments: Any) -> tuple:
        rank = arguments["parallel_dims"].get_mesh("pp").get_local_rank()
        _DrawsOfOneProcess(model, seed=(torch.initial_seed() - rank) % 2**64)
        return pipeline(model, **arguments)

    return pipeline_on_host


class _DrawsOfOneProcess:
    """State of a single process's generator at each parameter of a model.

    Args:
        whole: the model on the meta device, before it is cut into stages. This class replaces its
            initializers, and the stages copy them with the modules.
        seed: seed of the single process.
    """

    def __init__(self, whole: BaseModel, seed: int) -> None:
        self._whole = whole
        self._seed = seed
        self._states: dict[str, torch.Tensor] = {}
        for module_name, module in whole.named_modules():
            if isinstance(module, Module) and module._param_init is not None:
                module._param_init = {
                    name: functools.partial(self._initialize, f"{module_name}.{name}", initialize)
                    if initialize is not skip_param_init
                    else initialize
                    for name, initialize in module._param_init.items()
                }

    def __deepcopy__(self, memo: object) -> _DrawsOfOneProcess:
        return self

    def _initialize(
        self, name: str, initialize: Callable[[torch.Tensor], None], parameter: torch.Tensor
    ) -> None:
        if parameter.is_meta:  # of the whole model: draw its numbers and drop them
            self._states[name] = torch.get_rng_state()
            initialize(torch.empty_like(parameter, device="cpu"))
            return
        if not self._states:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self._seed)
                self._whole.init_weights()
        torch.set_rng_state(self._states[name])
        initialize(parameter)
