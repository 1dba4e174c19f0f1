"""Peak memory of a rank: measured by torch's own count in a real run, and planned."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support.train_jobs import build
from titan_moe_lb.commands.plan.building import silent_build
from titan_moe_lb.costmodel.hardware.device import SPECS, Hardware
from titan_moe_lb.costmodel.jobs.read_job import read_job
from titan_moe_lb.costmodel.times.outcome import View
from titan_moe_lb.job import job_config
from titan_moe_lb.upstream import zero_bubble

BALANCED = "--model.forced_routing={type = 'round_robin'}"
EP = "--parallelism.expert_parallel_degree="
PP = "--parallelism.pipeline_parallel_degree=2"
SCHEDULE = "--parallelism.pipeline_parallel_schedule="
TP = "--parallelism.tensor_parallel_degree=2"
NO_AC = "activation-checkpoint:None"

LAYOUTS = {
    "FSDP 2": (2, [NO_AC]),
    "FSDP 4": (4, [NO_AC]),
    "EP 4": (4, [f"{EP}4", NO_AC]),
    "EP 4, full": (4, [f"{EP}4", "activation-checkpoint:full"]),
    "EP 4, selective": (4, [f"{EP}4", "activation-checkpoint:selective"]),
    "HSDP 2 x 2, EP 2": (4, ["--parallelism.data_parallel_replicate_degree=2", f"{EP}2", NO_AC]),
    "TP 2": (4, [TP, NO_AC]),
    "TP 2, EP 4": (4, [TP, f"{EP}4", NO_AC]),
    "1F1B": (4, [PP, f"{SCHEDULE}1F1B", NO_AC]),
    "Interleaved1F1B, EP 2, full": (
        4,
        [PP, f"{SCHEDULE}Interleaved1F1B", f"{EP}2", "activation-checkpoint:full"],
    ),
    "ZBV, EP 2": (4, [PP, f"{SCHEDULE}ZBVZeroBubble", f"{EP}2", NO_AC]),
}
"""Number of ranks, and the flags of a job."""


class LiveBytes(TorchDispatchMode):
    """Largest number of bytes in live storages after any operator, given tensors included.

    Memory that is allocated below torch's dispatcher, such as gloo's own buffers, is not counted.
    """

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        super().__init__()
        self._live: dict[int, Any] = {}
        self.most = 0
        self._note(tensors)

    def _note(self, values: Any) -> bool:
        """Record new storages; return True if there are any."""
        new = False
        for value in tree_leaves(values):
            if not isinstance(value, torch.Tensor) or value.device.type == "meta":
                continue
            local = value._local_tensor if isinstance(value, DTensor) else value
            storage = local.untyped_storage()
            key = storage._cdata
            if key not in self._live:
                self._live[key] = weakref.ref(storage)
                weakref.finalize(storage, self._live.pop, key, None)
                new = True
        return new

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if self._note(result):
            # FSDP resizes storages: their sizes are read anew.
            storages = [reference() for reference in list(self._live.values())]
            now = sum(storage.nbytes() for storage in storages if storage is not None)
            self.most = max(self.most, now)
        return result


def measured_bytes(arguments: list[str]) -> int:
    """Measure this rank in its second optimizer step, when the optimizer's state exists."""
    config = job_config.load(["--debug.no-enable-structured-logging", *arguments]).config
    config.training.steps = 2
    config.metrics.log_freq = 1000
    config.metrics.write_moe_trace = False
    trainer = build(config)
    batches = trainer.batch_generator(trainer.dataloader)
    trainer.train_step(batches)
    held = [
        tensor for part in trainer.model_parts for tensor in (*part.parameters(), *part.buffers())
    ]
    held += [
        value
        for optimizer in trainer.optimizers
        for state in optimizer.state.values()
        for value in state.values()
    ]
    with LiveBytes(held) as account:
        trainer.train_step(batches)
    trainer.close()
    return account.most


def planned_bytes(arguments: list[str], world_size: int) -> dict[int, float]:
    """Plan the first rank of each pipeline position at balance, with the host as the device."""
    with silent_build():
        resolved = job_config.load(arguments, world_size)
        zero_bubble.adapt(resolved.config)
        job = read_job(resolved, on_host=True)
    device = Hardware(name="any", **{**dict.fromkeys(SPECS, 1.0), "scale_up_domain": 8})

    def planned(position: int) -> float:
        alone = dataclasses.replace(job, states={position: job.states[position]})
        view = View(alone, device, usable_bytes=1.0, num_hot_experts=1)
        return view.memory_at(1.0)[0]

    return {state.rank: planned(position) for position, state in job.states.items()}
