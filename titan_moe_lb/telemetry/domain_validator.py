"""Validation on held-out text of several domains: loss and expert load of each domain."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.validate import Validator

from titan_moe_lb.balancing.router import LoadBalancedRouter, routers_of
from titan_moe_lb.parallel.local_shard import local_shard
from titan_moe_lb.parallel.rank_groups import RankGroups
from titan_moe_lb.telemetry.metrics_processor import LoadBalanceMetricsProcessor
from titan_moe_lb.telemetry.reduction import reduce_counts
from titan_moe_lb.traces.balance_statistics import mark_absent
from titan_moe_lb.traces.domain_trace import DomainLoad


class DomainValidator(Validator):
    """torchtitan's ``Validator``, once for each domain; unchanged if no domains are set.

    The validation loss is the mean over the domains. The sinks receive the loss and MaxVio of each
    domain. ``domains.arrow`` in the run's folder receives the loss and the tokens of every expert.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Validator.Config):
        """Settings of the validation."""

        domains: list[str] = field(default_factory=list)
        """Datasets to validate on, one after the other, each in place of dataloader.dataset."""

    metrics_processor: MetricsProcessor | _CaughtLoss
    dl_config: Any

    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        """Validate on each domain. Collective over all ranks."""
        domains = self.config.domains
        if not domains:
            super().validate(model_parts, step)
            return
        metrics, dataloader = self.metrics_processor, self.dl_config
        assert isinstance(metrics, LoadBalanceMetricsProcessor), "the rules of a job refuse another"
        routers = routers_of(model_parts)
        loads: dict[str, DomainLoad] = {}
        for domain in domains:
            caught = _CaughtLoss(metrics)
            self.metrics_processor = caught
            self.dl_config = replace(dataloader, dataset=domain)
            for router in routers:
                device = local_shard(router.gate.weight).device
                router.held_out_counts_E = torch.zeros(
                    router.num_experts, dtype=torch.int64, device=device
                )
            try:
                super().validate(model_parts, step)
                loads[domain] = DomainLoad(loss=caught.loss, counts_ME=self._counts(routers))
            finally:
                self.metrics_processor, self.dl_config = metrics, dataloader
                for router in routers:
                    router.held_out_counts_E = None
        metrics.log_domains(loads, step)

    def _counts(self, routers: list[LoadBalancedRouter]) -> np.ndarray:
        """Sum the counts of the domain over all ranks and stages, int64 ``(M, E)``."""
        counts_NE, groups = None, RankGroups.of(self.parallel_dims)
        if routers:
            stacked = torch.nn.utils.rnn.pad_sequence(
                [router.held_out_counts_E for router in routers],  # type: ignore[misc]
                batch_first=True,
            )
            for group in groups.tokens:
                dist.all_reduce(stacked, group=group)
            num_experts_N = np.array([router.num_experts for router in routers])
            counts_NE = mark_absent(stacked.cpu().numpy(), num_experts_N)
        numbers = [router.layer for router in routers]
        return reduce_counts(numbers, counts_NE, groups)


class _CaughtLoss:
    """Stand-in for a metrics processor that saves the loss of one domain instead of logging it."""

    def __init__(self, metrics: LoadBalanceMetricsProcessor) -> None:
        self._metrics = metrics
        self.loss = float("nan")

    @property
    def ntokens_since_last_log(self) -> int:
        """Counter of torchtitan, shared with the real processor."""
        return self._metrics.ntokens_since_last_log

    @ntokens_since_last_log.setter
    def ntokens_since_last_log(self, number: int) -> None:
        self._metrics.ntokens_since_last_log = number

    def log_validation(self, loss: float, step: int) -> None:
        """Save the loss."""
        self.loss = loss
