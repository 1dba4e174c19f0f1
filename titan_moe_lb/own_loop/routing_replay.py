"""Replay of a rollout's experts in training.

In reinforcement learning, one forward scores a rollout and another one trains on it. The two can
choose different experts for the same tokens, which adds to the difference of their probabilities.
Rollout routing replay (R3, arXiv 2510.11370) saves the experts of the rollout and uses them in
training. The scores, and so the gradient of the gate, remain those of training.
"""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from titan_moe_lb.balancing.recording.replayed import RouterReplay
from titan_moe_lb.balancing.router import LoadBalancedRouter, routers_of
from titan_moe_lb.errors import JobError
from titan_moe_lb.own_loop.balance import Balance
from titan_moe_lb.own_loop.routing_input import (
    SAMPLE_IDS,
    SAMPLE_POSITIONS,
    expert_ids,
    samples_and_positions,
)
from titan_moe_lb.own_loop.routing_memory import (
    OWN_CHOICE,
    UNKNOWN,
    Recording,
    RoutingMemory,
    places_of_samples,
)
from titan_moe_lb.parallel.local_shard import local_shard


class RoutingReplay:
    """Experts of samples, saved in host memory for use in another forward.

    ::

        replay = RoutingReplay(balance)
        with replay.record(), torch.no_grad():
            model(tokens, sample_ids=ids)            # in the packing of the rollout
        replay.exchange()                            # if another rank may train on a sample
        with replay.replay():
            loss(model(tokens, sample_ids=ids)).backward()   # in any other packing

    A token takes 2 N K bytes on each rank that saves it: 8.7 KiB for the 58 MoE layers of
    DeepSeek-V3 without pipeline parallelism.

    Shape suffixes: B = rows, S = tokens of a whole row, L = tokens of a row on this rank, N = MoE
    layers of a model part, K = top_k, T = tokens of a sample.
    """

    def __init__(self, balance: Balance) -> None:
        """Register the replay with the model parts of a balance. Collective over pipeline stages."""
        if any(router.replay is not None for router in routers_of(balance.model_parts)):
            raise JobError(
                "the balance has a RoutingReplay already: make it once, before the loop, and "
                "forget() its samples"
            )
        self._balance = balance
        self._groups = balance.groups
        self._mode: Literal["record", "replay"] | None = None
        self._parts = [_Part(part) for part in balance.model_parts if routers_of([part])]
        self._layers = self._layers_of_the_model()
        self._recordings = self._most_steps_off_policy = 0
        self._counts: Counter[str] = Counter()
        for module in balance.model_parts:
            part = next((part for part in self._parts if part.module is module), None)
            module.register_forward_pre_hook(functools.partial(self._begin, part), with_kwargs=True)
            if part is not None:
                module.register_forward_hook(functools.partial(self._end, part))

    @contextmanager
    def record(self) -> Iterator[None]:
        """Record the forwards of the model, which need ``sample_ids``.

        All forwards within the context are one recording, which joins the parts of a sample and
        replaces earlier recordings of it.
        """
        self._recordings += self._mode != "record"
        with self._in_mode("record"):
            yield

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Use the saved experts in the forwards of the model, which need ``sample_ids``."""
        with self._in_mode("replay"):
            yield

    def add(self, sample: int, layer: int, expert_ids_TK: Any, *, step: int | None = None) -> None:
        """Save the choice of another engine, for one layer of a sample at a time.

        Once all layers of the rank were added, the next addition replaces the whole sample.

        Args:
            sample: number of the sample, at least 0.
            layer: number of the MoE layer in the whole model; ignored if it is on another rank.
            expert_ids_TK: integers ``(T, K)``: K different experts of each token, from position 0
                on, or a row of -1 for a token that chooses itself.
            step: finished optimizer steps of the weights that chose; None: those of the loop.

        Raises:
            JobError: an argument is invalid.
        """
        if layer not in self._layers:
            raise JobError(f"add(layer={layer}): the MoE layers of the model are {self._layers}")
        try:
            number = operator.index(sample)
        except TypeError:
            number = UNKNOWN
        if number < 0:
            raise JobError(f"add(sample={sample}): a sample has a whole number, at least 0")
        if step is not None and not 0 <= step <= self._now:
            raise JobError(
                f"add(step={step}): the loop has finished {self._now} optimizer steps; give those "
                "of the weights that chose"
            )
        self._recordings += 1
        recording = Recording(self._now, self._recordings, self._now if step is None else step)
        for part in self._parts:
            for row, router in enumerate(part.routers):
                if router.layer == layer:
                    ids_TK = expert_ids(expert_ids_TK, router.top_k, router.num_experts)
                    part.memory.add(recording, number, row, part.padded(ids_TK))

    def forget(self, samples: Sequence[int] | None = None) -> None:
        """Drop some samples; None: all samples."""
        for part in self._parts:
            for sample in list(part.memory.experts) if samples is None else samples:
                part.memory.forget(sample)

    def exchange(self) -> None:
        """Share all recordings of this rank's layers between the ranks that route different tokens.

        If several ranks have recorded a sample, the newest recording wins: the one of the later
        optimizer step, else the one of the rank with more recordings so far. Collective.
        """
        for group in self._groups.tokens:
            ranks: list[Any] = [None] * dist.get_world_size(group)
            mine = [(part.memory.recordings, part.memory.experts) for part in self._parts]
            dist.all_gather_object(ranks, (self._recordings, mine), group=group)
            self._recordings = max(recordings for recordings, _memories in ranks)
            for index, part in enumerate(self._parts):
                part.memory.merge([memories[index] for _recordings, memories in ranks])

    @property
    def num_bytes(self) -> int:
        """Host memory of the saved experts of this rank, in bytes."""
        return sum(ids.nbytes for part in self._parts for ids in part.memory.experts.values())

    def metrics(self) -> dict[str, float]:
        """Return metrics of the replayed forwards since the last call, over all ranks. Collective.

        ``moe/replay_changed_share``: share of the training forward's own choices that the replay
        replaced. ``moe/replay_off_policy_steps``: optimizer steps since the sample was recorded,
        mean over the tokens, and ``_max``. ``moe/replay_own_choice_share``: share of the tokens of
        samples that chose themselves, because they were added with -1.
        """
        device = self._parts[0].device if self._parts else torch.device("cpu")
        changed_2 = torch.zeros(2, dtype=torch.int64, device=device)
        for part in self._parts:
            for router in part.routers:
                assert router.replay is not None
                if router.replay.changed_2 is not None:
                    changed_2 += router.replay.changed_2
                    router.replay.changed_2 = None
        counts = [self._counts[name] for name in ("tokens", "steps", "choices", "own choices")]
        sums_6 = torch.cat([changed_2, torch.tensor(counts, device=device)])
        most_1 = torch.tensor([self._most_steps_off_policy], device=device)
        self._most_steps_off_policy = 0
        self._counts.clear()
        for group in self._groups.loop:
            dist.all_reduce(sums_6, group=group)
            dist.all_reduce(most_1, op=dist.ReduceOp.MAX, group=group)
        changed, taken, tokens, steps, choices, own_choices = sums_6.tolist()
        if not choices:
            return {}
        return {
            "moe/replay_changed_share": changed / max(taken, 1),
            "moe/replay_own_choice_share": own_choices / choices,
            "moe/replay_off_policy_steps": steps / max(tokens, 1),
            "moe/replay_off_policy_steps_max": float(most_1),
        }

    @property
    def _now(self) -> int:
        return self._balance.finished_steps

    def _layers_of_the_model(self) -> list[int]:
        """List the numbers of all MoE layers. Collective over the stages of a pipeline."""
        mine = [router.layer for part in self._parts for router in part.routers]
        stages: list[Any] = [mine]
        group = self._groups.stages.group
        if group is not None:
            stages = [None] * dist.get_world_size(group)
            dist.all_gather_object(stages, mine, group=group)
        return sorted({layer for layers in stages for layer in layers})

    @contextmanager
    def _in_mode(self, mode: Literal["record", "replay"]) -> Iterator[None]:
        before, self._mode = self._mode, mode
        try:
            yield
        finally:
            self._mode = before

    def _begin(
        self, part: _Part | None, _module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict]:
        """Prepare a forward of a part; None for a part without MoE layers."""
        samples, positions = kwargs.pop(SAMPLE_IDS, None), kwargs.pop(SAMPLE_POSITIONS, None)
        if part is None:
            return args, kwargs
        part.rest()
        if self._mode is None:
            return args, kwargs
        if samples is None:
            raise JobError(
                f"a forward under {self._mode}() has no sample_ids: call "
                "model(tokens, sample_ids=...)"
            )
        given = next(value for value in (*args, *kwargs.values()) if torch.is_tensor(value))
        shape = tuple(local_shard(given).shape)
        # Token ids have two dimensions; the activations between two stages have three.
        length = shape[1] * self._groups.context.size if len(shape) == 2 else None
        whole = samples_and_positions(samples, positions, rows=shape[0], length=length)
        part.samples_BL, part.positions_BL = (rows_BS[:, self._held(rows_BS)] for rows_BS in whole)
        if self._mode == "record":
            part.record()
        else:
            ids_NBLK = part.memory.recall(part.samples_BL, part.positions_BL)
            part.replay(ids_NBLK)
            self._counts["choices"] += len(ids_NBLK) * int((part.samples_BL >= 0).sum())
            self._counts["own choices"] += int((ids_NBLK[..., 0] == OWN_CHOICE).sum())
            if part.module.training and torch.is_grad_enabled() and part is self._parts[0]:
                self._count_off_policy(part)
        return args, kwargs

    def _end(self, part: _Part, _module: nn.Module, _args: tuple, _output: Any) -> None:
        """Finish a forward of a part."""
        if self._mode == "record":
            part.take_notes(Recording(self._now, self._recordings, self._now))

    def _held(self, rows_BS: np.ndarray) -> np.ndarray:
        """List the indices of the tokens of whole rows that the routers of this rank see."""
        slices = self._groups.token_slices(
            rows_BS.shape[1],
            self._parts[0].routers[0].config.loop.context_parallel_load_balancer,
        )
        return np.concatenate([np.arange(start, start + length) for start, length in slices])

    def _count_off_policy(self, part: _Part) -> None:
        for sample, places_T in places_of_samples(part.samples_BL):
            steps = self._now - part.memory.recordings[sample].step
            self._counts["tokens"] += len(places_T)
            self._counts["steps"] += steps * len(places_T)
            self._most_steps_off_policy = max(self._most_steps_off_policy, steps)


class _Part:
    """Model part of this rank, and the saved experts of its layers."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.routers: list[LoadBalancedRouter] = routers_of([module])
        for router in self.routers:
            router.replay = RouterReplay()
        self._top_k = max(router.top_k for router in self.routers)
        self.memory = RoutingMemory(len(self.routers), self._top_k)
        self.samples_BL = self.positions_BL = np.zeros((0, 0), dtype=np.int64)

    @property
    def device(self) -> torch.device:
        """Device of the routers."""
        return self.routers[0].gate.weight.device

    def padded(self, ids: np.ndarray) -> np.ndarray:
        """Pad the experts of a layer, ``(..., K)``, to the K of the layer with the most."""
        missing = [(0, 0)] * (ids.ndim - 1) + [(0, self._top_k - ids.shape[-1])]
        return np.pad(ids, missing, constant_values=UNKNOWN)

    def rest(self) -> None:
        """Stop recording and replay: all routers choose."""
        for router in self.routers:
            router.replay.notes, router.replay.expert_ids_BLK = False, None  # type: ignore[union-attr]

    def record(self) -> None:
        """Record the running forward."""
        for router in self.routers:
            router.replay.notes = True  # type: ignore[union-attr]

    def replay(self, ids_NBLK: np.ndarray) -> None:
        """Use these experts, int16, in the running forward."""
        on_device = torch.from_numpy(ids_NBLK).to(self.device).long()
        for router, ids_BLK in zip(self.routers, on_device, strict=True):
            replay = router.replay
            assert replay is not None
            replay.expert_ids_BLK = ids_BLK[..., : router.top_k]
            if replay.changed_2 is None:
                replay.changed_2 = torch.zeros(2, dtype=torch.int64, device=self.device)

    def take_notes(self, recording: Recording) -> None:
        """Save the choices of the routers in the last forward."""
        seen = [router.replay.seen_BLK.short().cpu().numpy() for router in self.routers]  # type: ignore[union-attr]
        self.rest()
        ids_NTK = np.stack([self.padded(ids_BLK).reshape(-1, self._top_k) for ids_BLK in seen])
        for sample, places_T in places_of_samples(self.samples_BL):
            positions_T = self.positions_BL.flat[places_T]
            if len(np.unique(positions_T)) < len(positions_T):
                raise JobError(
                    f"the forward has a position of sample {sample} twice: call "
                    "model(..., sample_positions=...) where a sample does not begin where it "
                    "begins in its row, and number each sample of a batch once"
                )
            self.memory.keep(recording, sample, positions_T, ids_NTK[:, places_T])
