"""Training on the experts that a rollout has used.

In reinforcement learning the forward that scores a rollout and the one that trains on it can
choose other experts for the same tokens, which makes their probabilities differ by more than the
policy has. Rollout routing replay (R3, arXiv 2510.11370) keeps the experts of the rollout and
takes them again in training; the scores, and so the gradient of the gate, are those of training.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from titan_moe_lb.errors import JobError
from titan_moe_lb.own_loop.attach import Balance
from titan_moe_lb.own_loop.routing_memory import RoutingMemory, positions_in_order, samples_in
from titan_moe_lb.parallel import batch_cut, layout
from titan_moe_lb.recording.replayed import RouterReplay
from titan_moe_lb.router import LoadBalancedRouter, routers_of

SAMPLE_IDS = "sample_ids"
"""Argument of the model's forward: int64 ``(B, S)``, whole rows, the sample of each token; -1 for a
token of none."""

SAMPLE_POSITIONS = "sample_positions"
"""The same: the position of each token in its sample. Without it a sample begins where it begins in
the row."""


class RoutingReplay:
    """Experts of samples, kept in host memory and taken again in another forward.

    ::

        replay = RoutingReplay(balance)
        with replay.record(), torch.no_grad():
            model(tokens, sample_ids=ids)            # however the rollout packs its samples
        replay.exchange()                            # where another rank may train on a sample
        with replay.replay():
            loss(model(tokens, sample_ids=ids)).backward()   # and however training does

    A token takes 2 N K bytes on each rank that keeps it, N being the MoE layers of the rank: 8.7 KiB
    for DeepSeek-V3's 58 layers without pipeline parallelism.

    Shape suffixes: B = rows, S = tokens of a whole row, L = those of it on this rank, N = MoE
    layers of a model part, K = top_k, T = tokens of a sample.
    """

    def __init__(self, balance: Balance) -> None:
        self._balance = balance
        self._dims = balance.parallel_dims
        self._mode: Literal["record", "replay"] | None = None
        self._parts = [_Part(part) for part in balance.model_parts if routers_of([part])]
        self._recorded_at: dict[int, int] = {}
        self._tokens = self._steps_off_policy = self._most_steps_off_policy = 0
        for module in balance.model_parts:
            part = next((part for part in self._parts if part.module is module), None)
            module.register_forward_pre_hook(functools.partial(self._begin, part), with_kwargs=True)
            if part is not None:
                module.register_forward_hook(functools.partial(self._end, part))

    @contextmanager
    def record(self) -> Iterator[None]:
        """Forwards of the model with ``sample_ids`` are remembered."""
        with self._in_mode("record"):
            yield

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Forwards of the model with ``sample_ids`` take the experts that were remembered."""
        with self._in_mode("replay"):
            yield

    def add(self, sample: int, layer: int, expert_ids_TK: Any, *, step: int | None = None) -> None:
        """Remember what another engine has chosen.

        Args:
            layer: number of the MoE layer in the whole model; one that this rank has not is left
                out.
            expert_ids_TK: int ``(T, K)``, -1 where unknown.
            step: finished optimizer steps of the weights that chose; default: now.
        """
        self._recorded_at[sample] = self._now if step is None else step
        for part in self._parts:
            for row, router in enumerate(part.routers):
                if router.layer == layer:
                    ids_TK = np.asarray(expert_ids_TK)
                    positions_T = np.arange(len(ids_TK))
                    part.memory.keep(sample, positions_T, ids_TK[None], layers=[row])

    def forget(self, samples: Sequence[int] | None = None) -> None:
        """Drop some samples; None: all."""
        for sample in list(self._recorded_at) if samples is None else samples:
            self._recorded_at.pop(sample, None)
            for part in self._parts:
                part.memory.experts.pop(sample, None)

    def exchange(self) -> None:
        """Give every rank what the others have recorded of its layers. Collective over the ranks
        that route other tokens."""
        for group in layout.token_groups(self._dims):
            parcels: list[Any] = [None] * dist.get_world_size(group)
            mine = (self._recorded_at, [part.memory.experts for part in self._parts])
            dist.all_gather_object(parcels, mine, group=group)
            for recorded_at, experts in parcels:
                self._recorded_at = {**recorded_at, **self._recorded_at}
                for part, of_samples in zip(self._parts, experts, strict=True):
                    for sample, ids_NTK in of_samples.items():
                        part.memory.keep(sample, np.arange(ids_NTK.shape[1]), ids_NTK)

    @property
    def num_bytes(self) -> int:
        """Host memory of what this rank remembers."""
        return sum(ids.nbytes for part in self._parts for ids in part.memory.experts.values())

    def metrics(self) -> dict[str, float]:
        """Of the replayed forwards since the last call, over all ranks. Collective.

        ``moe/replay_changed_share``: share of the experts that the training forward would have
        chosen itself and were not those of the rollout. ``moe/replay_off_policy_steps``: optimizer
        steps since the sample was recorded, mean over the tokens, and ``_max``.
        """
        device = self._parts[0].device if self._parts else torch.device("cpu")
        changed_2 = torch.zeros(2, dtype=torch.int64, device=device)
        for part in self._parts:
            for router in part.routers:
                assert router.replay is not None
                if router.replay.changed_2 is not None:
                    changed_2 += router.replay.changed_2
                    router.replay.changed_2 = None
        numbers = [self._tokens, self._steps_off_policy]
        sums_4 = torch.cat([changed_2, torch.tensor(numbers, device=device)])
        most_1 = torch.tensor([self._most_steps_off_policy], device=device)
        self._tokens = self._steps_off_policy = self._most_steps_off_policy = 0
        for group in self._groups:
            dist.all_reduce(sums_4, group=group)
            dist.all_reduce(most_1, op=dist.ReduceOp.MAX, group=group)
        changed, taken, tokens, steps = sums_4.tolist()
        if not taken:
            return {}
        return {
            "moe/replay_changed_share": changed / taken,
            "moe/replay_off_policy_steps": steps / tokens,
            "moe/replay_off_policy_steps_max": float(most_1),
        }

    @property
    def _groups(self) -> list[dist.ProcessGroup]:
        groups = layout.token_groups(self._dims)
        if self._dims.pp_enabled:
            groups.append(self._dims.get_mesh("pp").get_group())
        return groups

    @property
    def _now(self) -> int:
        return self._balance.finished_steps

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
        """Before a forward of a part; None: of one without MoE layers."""
        samples, positions = kwargs.pop(SAMPLE_IDS, None), kwargs.pop(SAMPLE_POSITIONS, None)
        if part is None:
            return args, kwargs
        part.tell(notes=False, expert_ids_NBLK=None)
        if self._mode is None:
            return args, kwargs
        if samples is None:
            raise JobError(
                f"a forward under {self._mode}() says nothing of its samples: call "
                "model(tokens, sample_ids=...)"
            )
        part.samples_BL, part.positions_BL = self._on_this_rank(samples, positions)
        if self._mode == "record":
            part.tell(notes=True, expert_ids_NBLK=None)
        else:
            ids_NBLK = torch.from_numpy(part.memory.recall(part.samples_BL, part.positions_BL))
            part.tell(notes=False, expert_ids_NBLK=ids_NBLK.to(part.device))
            if part.module.training and torch.is_grad_enabled() and part is self._parts[0]:
                self._count_off_policy(part.samples_BL)
        return args, kwargs

    def _end(self, part: _Part, _module: nn.Module, _args: tuple, _output: Any) -> None:
        """After a forward of a part."""
        if self._mode == "record":
            for sample in part.take_notes():
                self._recorded_at[sample] = self._now

    def _on_this_rank(
        self, samples: torch.Tensor, positions: torch.Tensor | None
    ) -> tuple[np.ndarray, np.ndarray]:
        samples_BS = samples.cpu().numpy()
        positions_BS = (
            positions_in_order(samples_BS) if positions is None else positions.cpu().numpy()
        )
        slices = batch_cut.token_slices(
            samples_BS.shape[1],
            self._dims,
            self._parts[0].routers[0].config.loop.context_parallel_load_balancer,
        )
        held = np.concatenate([np.arange(start, start + length) for start, length in slices])
        return samples_BS[:, held], positions_BS[:, held]

    def _count_off_policy(self, samples_BL: np.ndarray) -> None:
        for sample in samples_in(samples_BL):
            steps, tokens = self._now - self._recorded_at[sample], int((samples_BL == sample).sum())
            self._tokens += tokens
            self._steps_off_policy += steps * tokens
            self._most_steps_off_policy = max(self._most_steps_off_policy, steps)


class _Part:
    """A model part of this rank, and what is known of its layers."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.routers: list[LoadBalancedRouter] = routers_of([module])
        for router in self.routers:
            router.replay = RouterReplay()
        self.device = self.routers[0].gate.weight.device
        self.memory = RoutingMemory(len(self.routers), self.routers[0].top_k)
        self.samples_BL = self.positions_BL = np.zeros((0, 0), dtype=np.int64)

    def tell(self, *, notes: bool, expert_ids_NBLK: torch.Tensor | None) -> None:
        for row, router in enumerate(self.routers):
            replay = router.replay
            assert replay is not None
            replay.notes = notes
            replay.expert_ids_BLK = None if expert_ids_NBLK is None else expert_ids_NBLK[row]
            if expert_ids_NBLK is not None and replay.changed_2 is None:
                replay.changed_2 = torch.zeros(2, dtype=torch.int64, device=self.device)

    def take_notes(self) -> list[int]:
        """Keep what the routers have chosen; returns the samples."""
        seen = [router.replay.seen_BLK for router in self.routers]  # type: ignore[union-attr]
        ids_NBLK = torch.stack(seen).cpu().numpy()  # type: ignore[arg-type]
        self.tell(notes=False, expert_ids_NBLK=None)
        samples = samples_in(self.samples_BL)
        for sample in samples:
            its_BL = self.samples_BL == sample
            self.memory.keep(sample, self.positions_BL[its_BL], ids_NBLK[:, its_BL])
        return samples
