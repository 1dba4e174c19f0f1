"""Processes that run one function after another as the ranks of a job.

Importing torch and torchtitan takes longer than most checks, so the processes start once. On the
host, they are forked from a process that has imported both. Each call has a new process group with
the ranks that it needs: gloo on the host, or NCCL with one GPU a rank.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch.multiprocessing as multiprocessing
from torch.distributed import TCPStore

TIMEOUT_SECONDS = 300


def forkserver() -> Any:
    """Context of processes that are forked from one with torch and torchtitan imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.host_imports"])
    return context


class RankPool:
    """Pool of ranks: ``pool.run(n, function, ...)`` runs ``function(...)`` on n ranks.

    Args:
        size: largest number of ranks of a call.
        gpus: one id for each rank; None: compute on the host.
    """

    def __init__(self, size: int, gpus: list[str] | None = None) -> None:
        self.size = size
        self.gpus = gpus
        self._workers: list[tuple[Any, Connection]] = []

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def start_anew(self) -> None:
        """Replace the processes before the next call, after a call that changed them
        permanently."""
        self._stop()

    def need(self, num_ranks: int) -> None:
        """Fail if a call with so many ranks would fail; use it before other work."""
        assert num_ranks <= self.size, f"{num_ranks} ranks of {self.size}"

    def run(self, num_ranks: int, function: Callable, *args: Any, **kwargs: Any) -> list[Any]:
        """Call ``function`` on every rank; return the results by rank.

        Raises:
            RuntimeError: a rank failed; the message has its traceback.
        """
        self.need(num_ranks)
        if not self._workers:
            self._start()
        # Hosted here, as torchrun does: a rank that asks before its server is up waits a second.
        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        path = (function.__module__, function.__qualname__)
        busy = {}
        for rank, (_process, connection) in enumerate(self._workers[:num_ranks]):
            connection.send((rank, num_ranks, store.port, path, args, kwargs))
            busy[connection] = rank
        results: list[Any] = [None] * num_ranks
        while busy:
            ready = wait(list(busy), timeout=TIMEOUT_SECONDS)
            if not ready:
                self._stop()
                raise RuntimeError(f"{path[1]}: ranks {sorted(busy.values())} do not answer")
            for connection in ready:
                rank = busy.pop(connection)
                try:
                    error, results[rank] = connection.recv()
                except EOFError:
                    error = "the process died"
                if error:
                    # The other ranks may wait for this one in a collective.
                    self._stop()
                    raise RuntimeError(f"rank {rank} of {path[1]}:\n{error}")
        return results

    def _start(self) -> None:
        # CUDA does not survive a fork.
        context = multiprocessing.get_context("spawn") if self.gpus else forkserver()
        visible = ",".join(self.gpus or ())
        for _ in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, visible), daemon=True)
            process.start()
            self._workers.append((process, ours))

    def _stop(self) -> None:
        for process, connection in self._workers:
            connection.close()
            process.kill()
            process.join()
        self._workers = []


def _serve(connection: Connection, visible_gpus: str) -> None:
    if not visible_gpus:
        import tests.support.host_imports  # noqa: F401
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible_gpus
    import gc
    import logging
    import warnings

    import torch
    import torch._functorch.config
    import torch.compiler.config
    import torch.distributed as dist

    from tests.support import gone_meshes, sharding_memory

    sharding_memory.begin()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    time.sleep = sleep_unless_the_trainer_asks
    # A trainer switches automatic collection off and leaves cycles that hold its whole model. The
    # objects of the imports stay, and need not be traversed each time.
    gc.freeze()
    while True:
        try:
            rank, num_ranks, port, (module, name), args, kwargs = connection.recv()
        except EOFError:
            return
        logging.disable(logging.WARNING)
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(num_ranks),
            MASTER_ADDR="localhost",
            MASTER_PORT=str(port),
            TORCHELASTIC_USE_AGENT_STORE="True",
        )
        try:
            function = getattr(importlib.import_module(module), name)
            answer = (None, function(*args, **kwargs))
        except BaseException:
            answer = (traceback.format_exc(), None)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            gone_meshes.forget()
            sharding_memory.let_go_of_groups()
            torch._dynamo.reset()
            # Set by zero_bubble.adapt for the whole process.
            torch._functorch.config.donated_buffer = True
            torch.compiler.config.cache_key_tag = ""
            gc.collect()
        connection.send(answer)


_sleep = time.sleep


def sleep_unless_the_trainer_asks(seconds: float) -> None:
    """Skip the two seconds for which torchtitan's rank 0 waits at the end of a job."""
    if sys._getframe(1).f_globals["__name__"] != "torchtitan.trainer":
        _sleep(seconds)
