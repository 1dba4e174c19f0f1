"""The job: started, watched as torchrun's agent watches it, and compared with one left in peace."""

from __future__ import annotations

import multiprocessing
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from torch.distributed import TCPStore
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.format_utils import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from tests.chaos import rank
from titan_moe_lb.errors import JobError
from titan_moe_lb.job import job_config
from titan_moe_lb.rules.files import validate_files
from titan_moe_lb.traces.trace import read_trace

RANKS, STEPS, INTERVAL = 2, 8, 2
JOB = (
    "--module=deepseek_v3",
    "--config=deepseek_v3_tiny",
    f"--training.steps={STEPS}",
    "--training.local_batch_size=2",
    "--model.aux_losses=[{type='global_batch', weight=0.1}]",
    "--model.expert_bias={type='momentum'}",
    f"--parallelism.data_parallel_shard_degree={RANKS}",
    f"--parallelism.expert_parallel_degree={RANKS}",
    "--metrics.log_freq=1",
    "--checkpoint.enable",
    f"--checkpoint.interval={INTERVAL}",
    "--checkpoint.no-last-save-model-only",
    "--checkpoint.keep_latest_k=0",
    "--debug.seed=1",
    "--debug.deterministic",
    "--debug.no-enable-structured-logging",
)
_SECONDS = 240
_TIMED = ("tokens_per_second", "step_seconds")
"""Columns of the trace that no two runs share."""


@dataclass(frozen=True)
class End:
    """How a start of the job ended."""

    statuses: tuple[int | None, ...]
    """Of the ranks; negative: the signal."""
    line: str = ""
    """Of refusal, before any process was started, or of the first rank that said why."""

    @property
    def ok(self) -> bool:
        return not any(self.statuses)


def start(folder: Path, blow: rank.Blow | None = None, *flags: str) -> End:
    """Check the job as its launcher does, run it, and end all ranks when one has ended badly."""
    arguments = [*JOB, f"--dump_folder={folder}", *flags]
    try:
        validate_files(job_config.load(arguments, RANKS))
    except JobError as error:
        return End((2,) * RANKS, str(error))
    folder.mkdir(exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.host_imports", "tests.chaos.rank"])
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    processes = []
    for number in range(RANKS):
        environment = {
            "RANK": str(number),
            "LOCAL_RANK": str(number),
            "WORLD_SIZE": str(RANKS),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            **(blow.environment() if blow else {}),
        }
        console = str(folder / f"console{number}")
        process = context.Process(target=rank.run, args=(environment, arguments, console))
        process.start()
        processes.append(process)
    _watch(processes, blow)
    said = [Path(folder, f"console{number}").read_text() for number in range(RANKS)]
    words = [line for text in said for line in text.splitlines() if "error:" in line]
    return End(tuple(process.exitcode for process in processes), words[-1] if words else "")


def _watch(processes: list, blow: rank.Blow | None) -> None:
    due = time.monotonic() + _SECONDS
    while any(process.is_alive() for process in processes):
        if any(process.exitcode for process in processes) or time.monotonic() > due:
            time.sleep(0.3)
            for process in processes:
                process.kill()
        if blow and blow.signal == signal.SIGSTOP:
            _wake(processes)
        time.sleep(0.02)
    for process in processes:
        process.join()


def _wake(processes: list) -> None:
    for process in processes:
        if process.is_alive():
            one = psutil.Process(process.pid)
            if one.status() == psutil.STATUS_STOPPED:
                time.sleep(1.0)
                one.resume()


def tensors(folder: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    """All that a checkpoint holds: weights, biases, what losses and rules and the optimizer
    remember."""
    state: dict = {}
    _load_state_dict(
        state,
        storage_reader=FileSystemReader(folder / "checkpoint" / f"step-{step}"),
        planner=_EmptyStateDictLoadPlanner(),
        no_dist=True,
    )
    flat: dict[str, torch.Tensor] = {}
    _flatten(state, "", flat)
    return flat


def _flatten(tree: dict, prefix: str, flat: dict[str, torch.Tensor]) -> None:
    for key, value in tree.items():
        if isinstance(value, dict):
            _flatten(value, f"{prefix}{key}.", flat)
        elif isinstance(value, torch.Tensor):
            flat[f"{prefix}{key}"] = value


def differences(folder: Path, peaceful: Path, lost: frozenset[int] = frozenset()) -> list[str]:
    """Where a run is not the undisturbed one, bit by bit.

    Args:
        lost: steps whose record in the trace the fault itself has destroyed.
    """
    found, expected = tensors(folder), tensors(peaceful)
    assert len(expected) > 100
    wrong = sorted(found.keys() ^ expected.keys())
    wrong += [name for name in expected if name in found and not _same(found, expected, name)]
    trace, whole = read_trace(folder), read_trace(peaceful)
    kept = [index for index, step in enumerate(whole.steps) if int(step) not in lost]
    if trace.steps.tolist() != whole.steps[kept].tolist():
        return [*wrong, f"steps of the trace: {trace.steps.tolist()}"]
    if trace.damage:
        wrong.append(trace.damage[0])
    if not np.array_equal(trace.counts_SME, whole.counts_SME[kept]):
        wrong.append("counts of the trace")
    for name, values in (whole.layer_columns | whole.step_columns).items():
        others = (trace.layer_columns | trace.step_columns)[name]
        if name not in _TIMED and not np.array_equal(others, values[kept], equal_nan=True):
            wrong.append(f"{name} of the trace")
    return wrong


def _same(found: dict, expected: dict, name: str) -> bool:
    return torch.equal(found[name], expected[name])
