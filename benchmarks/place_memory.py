"""Memory of ``titan-moe-lb place`` while it places a large checkpoint.

    python -m benchmarks.place_memory [--gigabytes 1] [--folder DIR]

Builds a distributed checkpoint with torchtitan's names in ``folder``, as one rank saves it: MoE
layers with AdamW's moments. Prints the peak of the memory that ``place`` allocates, the largest
chunk of a tensor, and the seconds. The memory is ``RssAnon`` above its value before the call. It
excludes pages of files, which the system can reclaim. Runs on Linux only.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
import tyro

from titan_moe_lb.commands.place.command import place

EXPERTS, DIM, HIDDEN = 16, 512, 1024
TENSORS = ("w1_EFD", "w2_EDF", "w3_EFD")


@dataclass
class Arguments:
    """Flags of the benchmark."""

    gigabytes: float = 1.0
    folder: Path | None = None


class _Peak(threading.Thread):
    """Peak of this process's anonymous memory, sampled every millisecond."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = self._now()
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(1e-3):
            self.most = max(self.most, self._now())

    def stop(self) -> int:
        self._over.set()
        self.join()
        return self.most

    @staticmethod
    def _now() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) * 1024


def main() -> None:
    """Place a checkpoint, and print its memory and time."""
    arguments = tyro.cli(Arguments)
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        chunk = 4 * EXPERTS * DIM * HIDDEN
        layers = max(1, round(arguments.gigabytes * 1e9 / (chunk * len(TENSORS) * 3)))
        _save(folder / "checkpoint", layers)
        order = np.random.default_rng(0).permutation(EXPERTS).tolist()
        table = {"ep_degree": 2, "groups": [], "orders": dict.fromkeys(range(layers), order)}
        (folder / "placement.json").write_text(json.dumps(table))
        place(folder / "checkpoint", output=folder / "warm.json", file=folder / "placement.json")
        peak = _Peak()
        before = peak.most
        peak.start()
        started = time.perf_counter()
        said = place(
            folder / "checkpoint", output=folder / "placed", file=folder / "placement.json"
        )
        seconds = time.perf_counter() - started
        most = peak.stop() - before
    finally:
        shutil.rmtree(folder)
    print(said[0])
    print(
        json.dumps(
            {
                "own_memory_mb": round(most / 1e6),
                "largest_chunk_mb": round(chunk / 1e6),
                "seconds": round(seconds, 1),
            }
        )
    )


def _save(folder: Path, layers: int) -> None:
    state = {}
    for number in range(layers):
        moe = f"layers.{number}.moe"
        state[f"{moe}.router.gate.weight"] = torch.rand(EXPERTS, DIM)
        for name in TENSORS:
            weight = f"{moe}.routed_experts.inner_experts.{name}"
            shape = (EXPERTS, DIM, HIDDEN) if name.endswith("DF") else (EXPERTS, HIDDEN, DIM)
            for fqn in (weight, *(f"optimizer.state.{weight}.exp_avg{s}" for s in ("", "_sq"))):
                state[fqn] = torch.rand(shape)
    dcp.save(state, checkpoint_id=folder, no_dist=True)


if __name__ == "__main__":
    main()
