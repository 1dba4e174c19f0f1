"""Peers of this node: the other nodes of a run, and which of them failed or fell silent.

A collective fails when a peer is killed, but does not name the node. On a dropped link it waits
minutes for a timeout. So each launcher sends heartbeats to the store that torchrun's agent keeps
on node 0. Node 0 watches all other nodes, and they watch node 0.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import threading
import time
from collections.abc import Callable

from torch.distributed import DistError, PrefixStore, Store, TCPStore

from titan_moe_lb.errors import JobError
from titan_moe_lb.run.console.cause import Cause

_BEAT = 1.0
"""Seconds between two heartbeats."""
_SILENCE = 30.0
"""Seconds without a heartbeat after which a node is lost; a busy machine may miss several."""
_SUSPICION = 10.0
"""Seconds without a heartbeat after which a node is lost, once a collective has failed."""
_GRACE = 6.0
"""Seconds for this node to end by itself, after a failed collective or a signal to all nodes."""
_FAILED = "failed"


class Peers:
    """State of the other nodes, from the rendezvous until this node leaves.

    Args:
        on_loss: called once, in a thread, when another node has failed or is lost.
    """

    def __init__(self, on_loss: Callable[[], None]) -> None:
        self._on_loss = on_loss
        self._over = threading.Event()
        self._exchanged: float | None = None
        """Time of the store's last answer; None before the first."""
        self._names: dict[int, str] = {}
        self._signs: dict[int, tuple[int, float]] = {}
        """Number of heartbeats of each watched node, and the time of the last one."""
        self._last_words: str | None = None
        self._is_told = threading.Event()
        self._heard: Cause | None = None
        self.loss: Cause | None = None
        """Cause for which ``on_loss`` was called."""

    def __enter__(self) -> Peers:
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()

    def meet(self, process: dict[str, str], run: str) -> str:
        """Agree on the name of the run, and start to watch the other nodes.

        ``process`` is the environment of the first process of this node, as torchrun sets it.

        Returns:
            The name of the launcher that came first.
        """
        host, port = process["MASTER_ADDR"], int(process["MASTER_PORT"])
        store = PrefixStore("peers", TCPStore(host, port, wait_for_workers=False))
        node = process["GROUP_RANK"]
        if store.compare_set(f"launcher {node}", "", run) != run.encode():
            raise JobError(
                f"NODE_RANK={node} is taken at RDZV_ENDPOINT={os.environ.get('RDZV_ENDPOINT')}: give each "
                "node its own NODE_RANK, and each run its own RDZV_ENDPOINT or RDZV_ID"
            )
        name = store.compare_set("run", "", run).decode()
        # Two threads: on a dead link, an operation of the store never returns.
        threading.Thread(target=self._exchange, args=(process, store), daemon=True).start()
        threading.Thread(target=self._watch, daemon=True).start()
        return name

    def tell(self, cause: Cause) -> None:
        """Report to the other nodes why this one ends, and wait until they can have read it."""
        if self._exchanged is not None and time.monotonic() - self._exchanged < 3 * _BEAT:
            self._last_words = json.dumps(dataclasses.asdict(cause))
            if self._is_told.wait(3 * _BEAT):
                time.sleep(2 * _BEAT)

    def blame(self) -> Cause | None:
        """Find the node whose failure broke a connection.

        Waits until a silent node would count as lost, at most 13 s.

        Returns:
            The cause, or None if no node has failed.
        """
        due = time.monotonic() + _SUSPICION + 3 * _BEAT
        while self._exchanged is not None and time.monotonic() < due:
            found = self._verdict(_SUSPICION)
            if found is not None:
                return found
            time.sleep(_BEAT / 4)
        return None

    def _exchange(self, process: dict[str, str], store: Store) -> None:
        node, nodes = int(process["GROUP_RANK"]), int(process["GROUP_WORLD_SIZE"])
        watched = range(1, nodes) if node == 0 else range(1)
        with contextlib.suppress(DistError):
            self._names[node] = f"node {node} (from rank {process['RANK']}, {socket.gethostname()})"
            store.set(f"name {node}", self._names[node])
            for other in watched:
                self._names[other] = store.get(f"name {other}").decode()
            while not self._over.is_set():
                self._beat(store, node, watched)
                self._exchanged = time.monotonic()
                self._over.wait(_BEAT)

    def _beat(self, store: Store, node: int, watched: range) -> None:
        store.add(f"signs {node}", 1)
        for other in watched:
            signs = store.add(f"signs {other}", 0)
            if other not in self._signs or self._signs[other][0] != signs:
                self._signs[other] = signs, time.monotonic()
        if self._last_words is not None:
            words = json.dumps([node, self._names[node], self._last_words])
            store.compare_set(_FAILED, "", words)
            self._is_told.set()
        if self._heard is None and store.check([_FAILED]):
            who, name, words = json.loads(store.get(_FAILED))
            if who != node:
                cause = Cause(**json.loads(words))
                line = f"{name} has ended: {cause.line}"
                self._heard = dataclasses.replace(cause, line=line, has_traceback=False)

    def _watch(self) -> None:
        found = None
        while found is None and not self._over.wait(_BEAT):
            found = self._verdict(_SILENCE)
        if found is not None and not self._over.wait(_GRACE):
            self.loss = found
            self._on_loss()

    def _verdict(self, silence: float) -> Cause | None:
        if self._heard is not None or self._exchanged is None:
            return self._heard
        now = time.monotonic()
        if now - self._exchanged > silence:  # the store is silent, and node 0 with it
            lost = list(self._signs)
        else:
            lost = [node for node, (_, last) in self._signs.items() if now - last > silence]
        if not lost:
            return None
        names = " and ".join(self._names[node] for node in lost)
        line = f"no sign of life of {names} for {silence:.0f} s: it or its network is down"
        return Cause(line=line, has_traceback=False)
